// One task of the attention: gather latents of a tile, reconstruct a head's keys, score, softmax
// and accumulate value latents. The steps are defined in a header each. A few query rows take tile
// after tile. Many take slices of several tiles, whose keys and values are reconstructed first.
#pragma once

#include "batch.h"
#include "layer.h"
#include "products.h"
#include "scratch.h"
#include "task.h"

namespace recalkv::RECALKV_ISA {

RECALKV_INLINE int round_up(int count) { return (count + 15) / 16 * 16; }

// Reconstructed keys and values of a slice that stay in the L2 cache.
constexpr int64_t kSliceBytes = 256 << 10;

// Tokens whose codes are still in the nearest cache when a next segment of them is read.
constexpr int kTokenBlock = 16;

// x, but no less than 0 and no more than `most`.
RECALKV_INLINE int clamp(int64_t x, int most) {
  if (x < 0) return 0;
  return x < most ? static_cast<int>(x) : most;
}

// Products of a latent per token and KV head, for `rows` queries: reconstruction, folded pairs, and
// the folding's share.
RECALKV_INLINE int cost(const Expansion& expansion, int rows) {
  const int tile = rows * expansion.terms * (2 * expansion.tile_pairs + kTerms);
  const int stretch = rows * kTerms * 2 * expansion.stretch_pairs;
  return 2 * expansion.exact_pairs + rows * expansion.terms + tile / kTile + stretch / kStretch;
}

// The cheapest expansion for `rows` queries per KV head; null where whole keys are cheaper.
RECALKV_INLINE const Expansion* cheapest_expansion(const Layer& layer, int rows) {
  if (rows > kRowBlock) return nullptr;
  const Expansion* best = nullptr;
  int least = layer.head_dim * 7 / 8;
  for (int i = 0; i < layer.num_expansions; ++i) {
    const int its = cost(layer.expansions[i], rows);
    if (its >= least) continue;
    least = its;
    best = &layer.expansions[i];
  }
  return best;
}

template <class Format>
struct Attention {
  using Raw = typename Format::Raw;
  static constexpr int kTokenUnits = kTile / Format::kPerUnit;
  static constexpr int kPairUnits = 2 / Format::kPerUnit;

  const Layer& layer;
  const Batch& batch;
  const Task& task;
  const int first_head, num_heads;   // KV heads of the task
  const int rows;                    // query rows per KV head, query-major
  const int depth;                   // units of a head
  const int k_units;                 // units of a K span
  const Expansion* const expansion;  // of low-frequency pairs, or null
  const int exact_rows;              // rows of a head's factors that are reconstructed
  const bool dense;                  // values are reconstructed, and sums of them are results
  const int v_units;                 // units of a V span
  const int width;                   // columns of a row of sums: of values, or of value latents
  const int slice_tiles;             // tiles of a slice, 1 where there are no slices

  Products products;
  Unit* queries;            // [num_heads][rows][depth], pair order
  Unit* z_columns;          // [k_units][kTile]
  Unit* keys;               // [depth][kTile], of the panel in use
  Unit* values;             // [kTokenUnits][width], likewise
  float* scores;            // [kRowBlock][kTile]
  Unit* weights;            // [kRowBlock][kTokenUnits]
  float* running_max;       // [num_heads][rows], of logits in base 2
  float* running_sum;       // [num_heads][rows]
  float* key_scale;         // [kTile], factor on each key from the cache, likewise
  float* new_max;           // [kRowBlock]
  float* rescale;           // [kRowBlock]
  Raw* zeros;               // a latent for tokens past the end
  Unit* widened;            // [kLanes][widest row], where the source is not made of units
  Unit* z_rows;             // [kTile][v_units], where values are reconstructed
  float* sums;              // [num_heads][rows][width], of weighted values or value latents
  Unit* turned;             // [rows][terms][pairs][kPairUnits], see turn()
  Unit* absorbed;           // [num_heads][rows][terms][k_units]
  float* offsets;           // [num_heads][rows][terms], the key bias' share
  float* stretch_absorbed;  // [num_heads][rows][kTerms][k_width]
  float* stretch_offsets;   // [num_heads][rows][kTerms]
  Raw* dequantized;         // [kTile][dequantized_stride], where the cache is quantized
  int64_t dequantized_stride;
  struct Range {
    int64_t begin, end;
  };
  Range* parts;  // [num_parts], columns that the task reads, see plan_parts()
  int num_parts = 0;
  // Columns of a part that are of one band, and where their planes are among a token's codes.
  struct Segment {
    Codec codec;
    int64_t begin, end;
    int64_t low, high;
  };
  Segment* segments;  // [num_segments], see plan_segments()
  int num_segments = 0;
  Range groups;   // whose scales they have
  float* scales;  // [kTokenBlock][scales_stride], of these
  int64_t scales_stride;
  Range* reads;  // [num_reads], bytes of a token's latents, or of its codes, that the task reads
  int num_reads = 0;
  // Where a tile's tokens lie; latents are null past the end.
  struct Tile {
    const Raw* latents[kTile];  // in the cache, or in `dequantized` once dequantize() ran
    const uint8_t* codes[kTile];
    const uint8_t* scales[kTile];
    const float* key_scales[kTile];
  };
  Tile tiles[2];
  Tile* tile = &tiles[0];
  Tile* next = &tiles[1];  // the tile to prefetch
  // Where in it prefetch_some() goes on, and how many lines it takes.
  int fetch_token = 0, fetch_read = 0;
  int64_t fetch_byte = 0;
  int prefetch_lines;
  // Panels of a slice's tiles, and in each of all heads; a single one without slices.
  Unit* key_panels;
  Unit* value_panels;
  float* key_scales;

  Attention(const Layer& l, const Batch& b, const Task& t, Scratch& scratch)
      : layer(l),
        batch(b),
        task(t),
        first_head(t.group_begin * l.group_heads),
        num_heads((t.group_end - t.group_begin) * l.group_heads),
        rows(t.num_queries * b.queries_per_kv),
        depth(l.head_dim / Format::kPerUnit),
        k_units(l.k_width / Format::kPerUnit),
        expansion(cheapest_expansion(l, rows)),
        exact_rows(expansion ? 2 * expansion->exact_pairs : l.head_dim),
        dense(t.heads != nullptr),
        v_units(l.v_width / Format::kPerUnit),
        width(dense ? l.head_dim : l.v_width),
        slice_tiles(tiles_of_slice()),
        products(scratch) {
    queries = scratch.take<Unit>(int64_t{num_heads} * rows * depth);
    z_columns = scratch.take<Unit>(k_units * kTile);
    const int64_t panels = slice_tiles > 1 ? int64_t{slice_tiles} * num_heads : 1;
    key_panels = scratch.take<Unit>(panels * depth * kTile);
    value_panels = scratch.take<Unit>(panels * kTokenUnits * width);
    key_scales = scratch.take<float>(panels * kTile);
    use_panel(0);
    scores = scratch.take<float>(kRowBlock * kTile);
    weights = scratch.take<Unit>(kRowBlock * kTokenUnits);
    // Read in whole vectors.
    running_max = scratch.take<float>(int64_t{num_heads} * rows + kLanes);
    running_sum = scratch.take<float>(int64_t{num_heads} * rows);
    new_max = scratch.take<float>(kRowBlock);
    rescale = scratch.take<float>(kRowBlock);
    const int widest = layer.k_width > layer.v_width ? layer.k_width : layer.v_width;
    zeros = scratch.take<Raw>(widest);
    const int most_parts = layer.k_groups + layer.v_groups;
    parts = scratch.take<Range>(most_parts);
    int most_reads = most_parts;
    if (quantized()) {
      // Every band but the first, and every part but the first, starts one more segment at most.
      const int most_segments = most_parts + batch.latents.num_bands;
      most_reads = 2 * most_segments;
      segments = scratch.take<Segment>(most_segments);
      // A line more than a row, or the rows of large ranks would share few sets of the cache.
      dequantized_stride = batch.latents.rank + 64 / static_cast<int64_t>(sizeof(Raw));
      dequantized = scratch.take<Raw>(kTile * dequantized_stride);
      scales_stride = round_up(batch.latents.groups);
      scales = scratch.take<float>(kTokenBlock * scales_stride);
    }
    reads = scratch.take<Range>(most_reads);
    if (expansion) {
      const int terms = expansion->terms;
      const int of_tile = terms * round_up(expansion->tile_pairs);
      const int of_stretch = kTerms * round_up(expansion->stretch_pairs);
      turned =
          scratch.take<Unit>(rows * (of_tile > of_stretch ? of_tile : of_stretch) * kPairUnits);
      absorbed = scratch.take<Unit>(int64_t{num_heads} * rows * terms * k_units);
      offsets = scratch.take<float>(int64_t{num_heads} * rows * terms);
      stretch_absorbed = scratch.take<float>(int64_t{num_heads} * rows * kTerms * layer.k_width);
      stretch_offsets = scratch.take<float>(int64_t{num_heads} * rows * kTerms);
    }
    widened = scratch.take<Unit>(kLanes * (widest > layer.head_dim ? widest : layer.head_dim));
    sums = scratch.take<float>(int64_t{num_heads} * rows * width);
    if (dense) z_rows = scratch.take<Unit>(kTile * v_units);
  }

  // Row (query, head) of the results that a KV head's row is.
  RECALKV_INLINE int64_t out_row(int head, int row) const {
    const int query = row / batch.queries_per_kv;
    return int64_t{query} * batch.num_heads + (first_head + head) * batch.queries_per_kv +
           row % batch.queries_per_kv;
  }

  RECALKV_INLINE bool quantized() const { return batch.latents.num_bands != 0; }

  RECALKV_INLINE const Raw* span(const Raw* latent, int64_t start) const {
    return latent == nullptr ? zeros : latent + start;
  }

  // rows.h
  void load_queries();
  template <class T>
  void reorder(const T* in, T* out, int first, int pairs) const;
  void start();
  RECALKV_INLINE float share_beside_sink(int head, int row, float maximum, float sum) const;
  void finish();

  // gather.h
  void locate(int64_t first, int valid, Tile& tile) const;
  void plan_parts();
  void add_part(int64_t begin, int64_t end);
  void gather_columns(const Raw* const* latents, int64_t start);
  void gather_values(const Raw* const* latents, int64_t start);
  void gather_rows(const Raw* const* latents, int64_t start);
  void gather_key_scales(int head);

  // dequantize.h
  void plan_segments();
  void dequantize(const Tile& tile, int valid);
  template <ScaleType kType>
  void dequantize(const Tile& tile, int begin, int end);
  template <ScaleType kType, Codec kCodec>
  void dequantize(const Segment& segment, const Tile& tile, int begin, int end);
  template <ScaleType kType>
  RECALKV_INLINE void widen_scales(const Tile& tile, int begin, int end);
  template <Codec kCodec>
  RECALKV_INLINE void dequantize_blocks(const Segment& segment, const Tile& tile, int begin,
                                        int end);

  // prefetch.h
  void add_read(int64_t begin, int64_t end);
  void plan_prefetch();
  RECALKV_INLINE void restart_prefetch();
  RECALKV_INLINE void prefetch_some();

  // reconstruct.h
  void reconstruct(int head, int64_t tile);
  void reconstruct_values(int head);

  // expansion.h
  void turn(int head, int first_pair, int pairs, int terms, const float* coefficients,
            float* shift);
  Matrix pair_factors(int head, int pair) const;
  void absorb_stretch(int head, int64_t first);
  void absorb(int head, int64_t first);
  void score_expanded(int head);

  // attend.h
  void softmax(int head, int begin, int count, int columns, int64_t first);
  RECALKV_INLINE void hide(float* of_row, Range seen, int columns) const;
  RECALKV_INLINE Range visible(int row, int64_t first) const;
  RECALKV_INLINE bool scores_are_logits() const;
  RECALKV_INLINE Vec logits(Vec score, int token) const;
  RECALKV_INLINE Vec cap(Vec x) const;
  void attend(int head, int begin, int64_t first);

  // Tokens of the tile at `first` that this task covers, 0 past its end.
  RECALKV_INLINE int tile_tokens(int64_t first) const { return clamp(task.kv_end - first, kTile); }

  // As many as kSliceBytes hold, and no more than there are.
  int tiles_of_slice() const {
    if (rows <= kRowBlock) return 1;
    const int64_t panel = (int64_t{depth} * kTile + kTokenUnits * width) * sizeof(Unit);
    const int64_t held = kSliceBytes / (num_heads * panel);
    const int64_t all = (task.kv_end - task.kv_begin + kTile - 1) / kTile;
    const int64_t tiles = held < all ? held : all;
    return tiles > 1 ? static_cast<int>(tiles) : 1;
  }

  RECALKV_INLINE void use_panel(int64_t panel) {
    keys = key_panels + panel * depth * kTile;
    values = value_panels + panel * kTokenUnits * width;
    key_scale = key_scales + panel * kTile;
  }

  // walk.h
  void enter(int64_t first);
  void gather(int head, bool values_are_shared);
  void run_tile(int64_t first);
  void run_slice(int64_t begin, int64_t end);
  void run();
};

}  // namespace recalkv::RECALKV_ISA

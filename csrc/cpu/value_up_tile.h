// Value latents of some rows to head outputs: out = (L_v o_lat + b_v) · share.
#pragma once

#include "products.h"
#include "scratch.h"
#include "value_up.h"

namespace recalkv::RECALKV_ISA {

template <class Format>
struct ValueUpScratch {
  Products products;
  Unit* columns;  // [v units][kTile], the rows' latents
  float* result;  // [head_dim][kTile]
  Unit* narrow;   // [kLanes][v units]
  Unit* widened;  // [head_dim][v units], where the factors are not made of units

  ValueUpScratch(const ValueUp& job, Scratch& scratch) : products(scratch) {
    const int units = job.v_width / Format::kPerUnit;
    columns = scratch.take<Unit>(int64_t{units} * kTile);
    result = scratch.take<float>(int64_t{job.head_dim} * kTile);
    narrow = scratch.take<Unit>(int64_t{units} * kLanes);
    widened = scratch.take<Unit>(Format::kRawIsUnits ? 0 : int64_t{job.head_dim} * units);
  }
};

template <class Format, class Output>
void value_up(const ValueUp& job, void* memory) {
  using Raw = typename Format::Raw;
  Scratch scratch{static_cast<char*>(memory)};
  ValueUpScratch<Format> space(job, scratch);
  const int units = job.v_width / Format::kPerUnit;
  const int rows = static_cast<int>(job.rows);
  const int columns = (rows + 15) / 16 * 16;
  const auto output_row = [&](int row) {
    const int64_t index = job.first_row + row;
    return index / job.queries_per_kv * job.num_heads + int64_t{job.head} * job.queries_per_kv +
           index % job.queries_per_kv;
  };

  for (int first = 0; first < columns; first += kLanes) {
    const Unit* sources[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      // Columns past the last row repeat it; their results are not stored.
      const int row = first + i < rows ? first + i : rows - 1;
      Unit* out = space.narrow + i * units;
      Format::narrow(job.o_lat + output_row(row) * job.v_width, out, job.v_width);
      sources[i] = out;
    }
    for (int k = 0; k < units; k += kLanes) {
      transpose(sources, space.columns + int64_t{k} * kTile + first, kTile,
                units - k < kLanes ? units - k : kLanes);
      for (int i = 0; i < kLanes; ++i) sources[i] += kLanes;
    }
  }

  const Raw* raw =
      static_cast<const Raw*>(job.factors) + int64_t{job.head} * job.head_dim * job.v_width;
  const Unit* factors;
  if constexpr (Format::kRawIsUnits) {
    factors = reinterpret_cast<const Unit*>(raw);
  } else {
    Format::widen(raw, space.widened, job.head_dim * job.v_width);
    factors = space.widened;
  }
  const float* bias = job.bias ? job.bias + int64_t{job.head} * job.head_dim : nullptr;
  space.products.template run<Format>(
      job.head_dim, columns, {factors, units}, {space.columns, kTile}, units,
      [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int) __attribute__((always_inline)) {
    for_sums(acc, [&](Vec& sum, int i, int)
                      __attribute__((always_inline)) { sum = splat(bias ? bias[row + i] : 0.0f); });
  }, [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    for_sums(acc, [&](Vec& sum, int i, int j) __attribute__((always_inline)) {
      store(space.result + (row + i) * kTile + column + j * kLanes, sum);
    });
  });

  typename Output::Raw* out = static_cast<typename Output::Raw*>(job.out);
  for (int first = 0; first < rows; first += kLanes) {
    for (int dim = 0; dim < job.head_dim; dim += kLanes) {
      const Unit* sources[kLanes];
      Unit block[kLanes * kLanes];
      for (int i = 0; i < kLanes; ++i)
        sources[i] = reinterpret_cast<const Unit*>(space.result + (dim + i) * kTile + first);
      transpose(sources, block, kLanes, kLanes);
      for (int i = 0; i < kLanes && first + i < rows; ++i) {
        const int64_t index = output_row(first + i);
        Vec values = load_units(block + i * kLanes);
        if (job.shares) values = mul(values, splat(job.shares[index]));
        Output::store(out + index * job.head_dim + dim, values);
      }
    }
  }
}

template <class Format>
int64_t value_up_scratch_bytes(const ValueUp& job) {
  Scratch scratch{nullptr};
  ValueUpScratch<Format> unused(job, scratch);
  return scratch.used;
}

}  // namespace recalkv::RECALKV_ISA

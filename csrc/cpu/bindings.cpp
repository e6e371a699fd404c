// torch.ops.recalkv_cpu, and the Python module that loads it.
#include <Python.h>
#include <torch/library.h>

#include <vector>

#include "isa.h"
#include "ops.h"

namespace recalkv {
namespace {

std::string best_isa_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return best_isa(kFloat32);
    case at::kHalf: return best_isa(kFloat16);
    case at::kBFloat16: return best_isa(kBFloat16);
    default: return "";
  }
}

bool isa_supported(std::string_view name) { return find_isa(std::string(name)) != nullptr; }

// Sizes that tables are packed for: tile, terms and span of the expansion.
std::vector<int64_t> table_sizes() { return {kTile, kTerms, kSpan}; }

}  // namespace
}  // namespace recalkv

TORCH_LIBRARY(recalkv_cpu, m) {
  m.def("best_isa(ScalarType dtype) -> str", &recalkv::best_isa_of);
  m.def("isa_supported(str name) -> bool", &recalkv::isa_supported);
  m.def("table_sizes() -> int[]", &recalkv::table_sizes);
  m.def(
      "latent_cache_update(Tensor z, Tensor(a!) kv_cache, Tensor slot_mapping, "
      "str latent_dtype, int group_size) -> ()");
  m.def(
      "latent_value_up(Tensor o_lat, Tensor v_up, Tensor? v_bias, ScalarType out_dtype, str isa) "
      "-> Tensor");
  m.def(
      "paged_latent_attention(Tensor q, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor query_start_loc, Tensor k_factors, Tensor? k_bias, Tensor? k_norm_weight, "
      "Tensor? rope, Tensor? basis, Tensor? coefficients, Tensor? pair_factors, int[] k_starts, "
      "int[] v_starts, int v_width, int max_position, bool is_neox, float scale, "
      "float k_norm_eps, float soft_cap, int window, str isa, str latent_dtype, int group_size, "
      "int rank) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(recalkv_cpu, CPU, m) {
  m.impl("latent_cache_update", &recalkv::latent_cache_update);
  m.impl("latent_value_up", &recalkv::latent_value_up);
  m.impl("paged_latent_attention", &recalkv::paged_latent_attention);
}

extern "C" PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

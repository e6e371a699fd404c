// torch.ops.recalkv_cpu, and the Python module that loads it.
#include <ATen/core/dispatch/Dispatcher.h>
#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

#include <vector>

#include "attention_layer.h"
#include "dtypes.h"
#include "isa.h"
#include "ops.h"

namespace recalkv {
namespace {

// Read off the file before it is loaded (recalkv_vllm/ops/cpu/extension.py).
[[gnu::used]] constexpr char kBuiltAgainst[] = "recalkv_vllm: built against torch " TORCH_VERSION;

std::vector<std::string> instruction_sets_of(at::ScalarType dtype) {
  return instruction_sets(element_type_of(dtype, "dtype"));
}

// Whether an instruction set takes factors in bf16, rather than float32.
bool bf16_products(std::string_view isa) { return checked_isa(isa).factors == kBFloat16; }

// Sizes that tables are packed for: tile; terms and stretch of the expansion.
std::vector<int64_t> table_sizes() { return {kTile, kTerms, kStretch}; }

// The ops as methods of their layer, for calls from Python: taking the layer out of an op's
// arguments there costs as much as a small call. They go through the dispatcher like any call of an
// op.
std::tuple<at::Tensor, at::Tensor> attend(const c10::intrusive_ptr<AttentionLayer>& layer,
                                          const at::Tensor& q, const at::Tensor& kv_cache,
                                          const at::Tensor& block_table, const at::Tensor& seq_lens,
                                          const at::Tensor& query_start_loc) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("recalkv_cpu::paged_latent_attention", "")
                             .typed<decltype(paged_latent_attention)>();
  return op.call(layer, q, kv_cache, block_table, seq_lens, query_start_loc);
}

void attend_heads(const c10::intrusive_ptr<AttentionLayer>& layer, const at::Tensor& q,
                  const at::Tensor& kv_cache, const at::Tensor& block_table,
                  const at::Tensor& seq_lens, const at::Tensor& query_start_loc, at::Tensor heads) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("recalkv_cpu::paged_latent_attention_heads", "")
                             .typed<decltype(paged_latent_attention_heads)>();
  op.call(layer, q, kv_cache, block_table, seq_lens, query_start_loc, heads);
}

}  // namespace
}  // namespace recalkv

TORCH_LIBRARY(recalkv_cpu, m) {
  using c10::intrusive_ptr, torch::arg;
  using recalkv::AttentionLayer, recalkv::Keys, recalkv::Logits, recalkv::PairExpansion,
      recalkv::Rotation, recalkv::Spans, recalkv::Values;

  m.class_<Keys>("Keys").def(
      torch::init<at::Tensor, std::optional<at::Tensor>, int64_t, std::optional<at::Tensor>>(), "",
      {arg("factors"), arg("bias"), arg("scales"), arg("pair_factors")});
  m.class_<Spans>("Spans").def(torch::init<std::vector<int64_t>, std::vector<int64_t>, int64_t>(),
                               "", {arg("k_starts"), arg("v_starts"), arg("v_width")});
  m.class_<Values>("Values").def(
      torch::init<at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>>(), "",
      {arg("factors"), arg("bias"), arg("panel")});
  m.class_<Rotation>("Rotation")
      .def(torch::init<at::Tensor, int64_t, bool>(), "",
           {arg("tiles"), arg("max_position"), arg("is_neox")});
  m.class_<PairExpansion>("PairExpansion")
      .def(torch::init<int64_t, int64_t, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(), "",
           {arg("tile_pairs"), arg("stretch_pairs"), arg("basis"), arg("tile_coefficients"),
            arg("stretch_coefficients"), arg("stretch_basis")});
  m.class_<Logits>("Logits").def(torch::init<double, double, int64_t, std::optional<at::Tensor>>(),
                                 "", {arg("scale"), arg("soft_cap"), arg("window"), arg("sinks")});
  m.class_<AttentionLayer>("AttentionLayer")
      .def(torch::init<std::string, intrusive_ptr<Keys>, intrusive_ptr<Spans>,
                       intrusive_ptr<Values>, std::optional<intrusive_ptr<Rotation>>,
                       std::vector<intrusive_ptr<PairExpansion>>, intrusive_ptr<Logits>,
                       std::string, int64_t, std::optional<at::Tensor>>(),
           "",
           {arg("isa"), arg("keys"), arg("spans"), arg("values"), arg("rotation"),
            arg("expansions"), arg("logits"), arg("latent_dtype"), arg("group_size"), arg("bands")})
      .def("attend", &recalkv::attend)
      .def("attend_heads", &recalkv::attend_heads)
      .def("v_width", &AttentionLayer::v_width)
      // Torch's tracing compares its arguments, and asks them for their length.
      .def("__eq__", [](const intrusive_ptr<AttentionLayer>& self,
                        const intrusive_ptr<AttentionLayer>& other) { return self == other; })
      .def("__len__", [](const intrusive_ptr<AttentionLayer>&) -> int64_t { return 0; })
      // Fake tensors meet the layer itself: it is never changed, and a fake one would be a copy.
      .def("tracing_mode",
           [](const intrusive_ptr<AttentionLayer>&) -> std::string { return "real"; });

  m.def("instruction_sets(ScalarType dtype) -> str[]", &recalkv::instruction_sets_of);
  m.def("bf16_products(str isa) -> bool", &recalkv::bf16_products);
  m.def("table_sizes() -> int[]", &recalkv::table_sizes);
  m.def(
      "latent_cache_update(Tensor z, Tensor(a!) kv_cache, Tensor slot_mapping, "
      "str latent_dtype, int group_size, Tensor? bands) -> ()");
  m.def(
      "latent_value_up(Tensor o_lat, Tensor v_up, Tensor? v_bias, ScalarType out_dtype, str isa) "
      "-> Tensor");
  m.def(
      "paged_latent_attention(__torch__.torch.classes.recalkv_cpu.AttentionLayer layer, Tensor q, "
      "Tensor kv_cache, Tensor block_table, Tensor seq_lens, Tensor query_start_loc) "
      "-> (Tensor, Tensor)");
  m.def(
      "paged_latent_attention_heads(__torch__.torch.classes.recalkv_cpu.AttentionLayer layer, "
      "Tensor q, Tensor kv_cache, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, "
      "Tensor(a!) heads) -> ()");
}

TORCH_LIBRARY_IMPL(recalkv_cpu, CPU, m) {
  m.impl("latent_cache_update", &recalkv::latent_cache_update);
  m.impl("latent_value_up", &recalkv::latent_value_up);
  m.impl("paged_latent_attention", &recalkv::paged_latent_attention);
  m.impl("paged_latent_attention_heads", &recalkv::paged_latent_attention_heads);
}

extern "C" PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

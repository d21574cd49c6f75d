// The Python module reformer_kernels._C: the structs and functions of kernels.h under the same names.
//
// Pointers cross as integers; reformer_kernels/_native.py makes and checks every one of them.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/cpu_features.h"
#include "cpu/variants.h"
#include "cuda/device.h"
#include "kernels.h"

namespace py = pybind11;
using namespace reformer;

namespace {

// Binds a parameter struct. Its fields are attributes, and arguments of the constructor by position or by
// name; a name that the struct lacks raises AttributeError, and too many positions raise TypeError.
//
// The constructor sets the fields through a table of its own: setting a struct's attributes one by one
// through Python took a third of the time of a short attention call.
template <typename Struct>
class Fields {
 public:
  Fields(py::module_& module, const char* name) : class_(module, name) {
    class_.def(py::init([](const py::args& positional, const py::kwargs& named) {
      Struct value;
      const Setters& setters = known_setters();
      if (positional.size() > setters.size()) throw py::type_error("more values than fields");
      for (size_t i = 0; i < positional.size(); ++i) setters[i].second(value, positional[i]);
      for (auto [key, given] : named) {
        const auto wanted = key.template cast<std::string_view>();
        const auto known = std::find_if(setters.begin(), setters.end(),
                                        [&](const auto& entry) { return entry.first == wanted; });
        if (known == setters.end()) throw py::attribute_error("no field " + std::string(wanted));
        known->second(value, given);
      }
      return value;
    }));
  }

  template <typename Field>
  Fields& field(const char* name, Field Struct::* member) {
    known_setters().emplace_back(name, [member](Struct& s, py::handle given) {
      if constexpr (std::is_pointer_v<Field>) {
        s.*member = reinterpret_cast<Field>(given.cast<uintptr_t>());
      } else if constexpr (std::is_enum_v<Field>) {
        s.*member = static_cast<Field>(given.cast<int>());
      } else {
        s.*member = given.cast<Field>();
      }
    });
    if constexpr (std::is_pointer_v<Field>) {
      class_.def_property(
          name, [member](const Struct& s) { return reinterpret_cast<uintptr_t>(s.*member); },
          [member](Struct& s, uintptr_t address) { s.*member = reinterpret_cast<Field>(address); });
    } else if constexpr (std::is_enum_v<Field>) {
      class_.def_property(
          name, [member](const Struct& s) { return static_cast<int>(s.*member); },
          [member](Struct& s, int value) { s.*member = static_cast<Field>(value); });
    } else {
      class_.def_readwrite(name, member);
    }
    return *this;
  }

 private:
  using Setters = std::vector<std::pair<std::string_view, std::function<void(Struct&, py::handle)>>>;
  static Setters& known_setters() {
    static Setters table;
    return table;
  }

  py::class_<Struct> class_;
};

const auto kNoGil = py::call_guard<py::gil_scoped_release>();

// Raises ValueError for what a kernel found wrong with its input.
void check(Status status) {
  switch (status) {
    case Status::kOk:
      return;
    case Status::kBadOrder:
      throw std::invalid_argument("layout.order must hold a permutation of 0..L-1 in each round");
    case Status::kBadStarts:
      throw std::invalid_argument("layout.bucket_starts must rise from 0 to L in each round");
    case Status::kUnsorted:
      throw std::invalid_argument("layout.order must be sorted: positions must rise within each bucket");
    case Status::kEmpty:
      throw std::invalid_argument(
          "attention needs at least one token, one key, one hash round, two bucket starts and a chunk "
          "length of 1; leave the call out where there is nothing to attend to");
    case Status::kFull:
      throw std::invalid_argument(
          "the cache has no room for another token in some row: make it for more tokens");
    case Status::kTooManyCodes:
      throw std::invalid_argument(
          "so many buckets with so wide a window are more than duplicates can be counted in; use fewer "
          "buckets, a smaller window, or backend='reference'");
  }
}

// Raises RuntimeError for what CUDA said went wrong.
[[maybe_unused]] void check_cuda(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

py::dict cuda_info() {
  py::dict info;
#ifdef REFORMER_HAS_CUDA
  info["built"] = true;
  info["runtime_version"] = cuda::runtime_version();
  info["architectures"] = cuda::architectures();
  info["reason"] = "";
#else
  info["built"] = false;
  info["reason"] = REFORMER_CUDA_STATUS;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of reformer_kernels; see csrc/kernels.h.";

  Fields<Rows>(m, "Rows")
      .field("data", &Rows::data)
      .field("batch_stride", &Rows::batch_stride)
      .field("head_stride", &Rows::head_stride)
      .field("row_stride", &Rows::row_stride);

  Fields<RotationParams>(m, "RotationParams")
      .field("heads", &RotationParams::heads)
      .field("D", &RotationParams::D)
      .field("R", &RotationParams::R)
      .field("width", &RotationParams::width)
      .field("seed", &RotationParams::seed)
      .field("out", &RotationParams::out)
      .field("threads", &RotationParams::threads);
  m.def("sample_rotations", &sample_rotations, kNoGil);

  Fields<HashParams>(m, "HashParams")
      .field("B", &HashParams::B)
      .field("H", &HashParams::H)
      .field("L", &HashParams::L)
      .field("D", &HashParams::D)
      .field("R", &HashParams::R)
      .field("dtype", &HashParams::dtype)
      .field("x", &HashParams::x)
      .field("rotations", &HashParams::rotations)
      .field("rotation_heads", &HashParams::rotation_heads)
      .field("rotation_width", &HashParams::rotation_width)
      .field("seed", &HashParams::seed)
      .field("factors", &HashParams::factors)
      .field("n_factors", &HashParams::n_factors)
      .field("padding", &HashParams::padding)
      .field("buckets", &HashParams::buckets)
      .field("threads", &HashParams::threads);
  m.def("lsh_hash", &lsh_hash, kNoGil);

  Fields<SortParams>(m, "SortParams")
      .field("segments", &SortParams::segments)
      .field("L", &SortParams::L)
      .field("n_buckets", &SortParams::n_buckets)
      .field("starts_size", &SortParams::starts_size)
      .field("buckets", &SortParams::buckets)
      .field("order", &SortParams::order)
      .field("starts", &SortParams::starts)
      .field("threads", &SortParams::threads)
      .field("device", &SortParams::device)
      .field("stream", &SortParams::stream)
      .field("workspace", &SortParams::workspace);
  m.def("bucket_sort", &bucket_sort, kNoGil);
#ifdef REFORMER_HAS_CUDA
  m.def("cuda_bucket_sort_workspace_bytes", &cuda::bucket_sort_workspace_bytes);
  m.def("cuda_bucket_sort", [](const SortParams& params) { check_cuda(cuda::bucket_sort(params)); }, kNoGil);
#endif

  Fields<AttentionRule>(m, "AttentionRule")
      .field("rank_window", &AttentionRule::rank_window)
      .field("chunk_length", &AttentionRule::chunk_length)
      .field("chunks_before", &AttentionRule::chunks_before)
      .field("chunks_after", &AttentionRule::chunks_after)
      .field("window_before", &AttentionRule::window_before)
      .field("window_after", &AttentionRule::window_after)
      .field("bucket_mask", &AttentionRule::bucket_mask)
      .field("causal", &AttentionRule::causal)
      .field("exclude_self", &AttentionRule::exclude_self)
      .field("correct_duplicates", &AttentionRule::correct_duplicates)
      .field("ring", &AttentionRule::ring)
      .field("key_norm", &AttentionRule::key_norm);
  Fields<AttentionParams>(m, "AttentionParams")
      .field("B", &AttentionParams::B)
      .field("H", &AttentionParams::H)
      .field("L", &AttentionParams::L)
      .field("Lk", &AttentionParams::Lk)
      .field("D", &AttentionParams::D)
      .field("Dv", &AttentionParams::Dv)
      .field("R", &AttentionParams::R)
      .field("dtype", &AttentionParams::dtype)
      .field("q", &AttentionParams::q)
      .field("k", &AttentionParams::k)
      .field("v", &AttentionParams::v)
      .field("order", &AttentionParams::order)
      .field("starts", &AttentionParams::starts)
      .field("key_order", &AttentionParams::key_order)
      .field("key_starts", &AttentionParams::key_starts)
      .field("starts_size", &AttentionParams::starts_size)
      .field("key_bias", &AttentionParams::key_bias)
      .field("rule", &AttentionParams::rule)
      .field("scale", &AttentionParams::scale)
      .field("dropout_threshold", &AttentionParams::dropout_threshold)
      .field("keep_scale", &AttentionParams::keep_scale)
      .field("seed", &AttentionParams::seed)
      .field("out", &AttentionParams::out)
      .field("lse", &AttentionParams::lse)
      .field("workspace", &AttentionParams::workspace)
      .field("threads", &AttentionParams::threads);
  Fields<AttentionGradients>(m, "AttentionGradients")
      .field("grad_out", &AttentionGradients::grad_out)
      .field("grad_lse", &AttentionGradients::grad_lse)
      .field("grad_q", &AttentionGradients::grad_q)
      .field("grad_k", &AttentionGradients::grad_k)
      .field("grad_v", &AttentionGradients::grad_v);
  m.def("attention_forward_workspace_bytes", &attention_forward_workspace_bytes);
  m.def("attention_forward", [](const AttentionParams& params) { check(attention_forward(params)); }, kNoGil);
  m.def("attention_backward_workspace_bytes", &attention_backward_workspace_bytes);
  m.def(
      "attention_backward",
      [](const AttentionParams& params, const AttentionGradients& gradients) {
        check(attention_backward(params, gradients));
      },
      kNoGil);

  Fields<DecodeParams>(m, "DecodeParams")
      .field("B", &DecodeParams::B)
      .field("H", &DecodeParams::H)
      .field("D", &DecodeParams::D)
      .field("Dv", &DecodeParams::Dv)
      .field("R", &DecodeParams::R)
      .field("dtype", &DecodeParams::dtype)
      .field("q", &DecodeParams::q)
      .field("k", &DecodeParams::k)
      .field("v", &DecodeParams::v)
      .field("hashed", &DecodeParams::hashed)
      .field("out", &DecodeParams::out)
      .field("key_dtype", &DecodeParams::key_dtype)
      .field("value_dtype", &DecodeParams::value_dtype)
      .field("keys", &DecodeParams::keys)
      .field("values", &DecodeParams::values)
      .field("room", &DecodeParams::room)
      .field("capacity", &DecodeParams::capacity)
      .field("lengths", &DecodeParams::lengths)
      .field("rotations", &DecodeParams::rotations)
      .field("rotation_heads", &DecodeParams::rotation_heads)
      .field("rotation_width", &DecodeParams::rotation_width)
      .field("factors", &DecodeParams::factors)
      .field("n_factors", &DecodeParams::n_factors)
      .field("buckets", &DecodeParams::buckets)
      .field("order", &DecodeParams::order)
      .field("starts", &DecodeParams::starts)
      .field("order_size", &DecodeParams::order_size)
      .field("starts_size", &DecodeParams::starts_size)
      .field("recent", &DecodeParams::recent)
      .field("recent_buckets", &DecodeParams::recent_buckets)
      .field("recent_size", &DecodeParams::recent_size)
      .field("recent_count", &DecodeParams::recent_count)
      .field("rule", &DecodeParams::rule)
      .field("scale", &DecodeParams::scale)
      .field("threads", &DecodeParams::threads);
  m.def("decode_step", [](const DecodeParams& params) { check(decode_step(params)); }, kNoGil);

  Fields<ResidualParams>(m, "ResidualParams")
      .field("rows", &ResidualParams::rows)
      .field("columns", &ResidualParams::columns)
      .field("fixed_point", &ResidualParams::fixed_point)
      .field("scale", &ResidualParams::scale)
      .field("sign", &ResidualParams::sign)
      .field("dtype", &ResidualParams::dtype)
      .field("delta_dtype", &ResidualParams::delta_dtype)
      .field("stream", &ResidualParams::stream)
      .field("delta", &ResidualParams::delta)
      .field("value", &ResidualParams::value)
      .field("normalization", &ResidualParams::normalization)
      .field("epsilon", &ResidualParams::epsilon)
      .field("norm_weight", &ResidualParams::norm_weight)
      .field("norm_bias", &ResidualParams::norm_bias)
      .field("normed", &ResidualParams::normed)
      .field("mean", &ResidualParams::mean)
      .field("rstd", &ResidualParams::rstd)
      .field("flag", &ResidualParams::flag)
      .field("threads", &ResidualParams::threads);
  m.def("residual_step", &residual_step, kNoGil);

  m.def("prefer_huge_pages",
        [](uintptr_t address, size_t bytes) { prefer_huge_pages(reinterpret_cast<void*>(address), bytes); });
  m.def("active_isa", &active_isa);
  m.def("active_isa_reason", &active_isa_reason);
  m.def(
      "best_isa",
      [](const std::string& vendor, bool avx2, bool avx512, bool avx512bf16) {
        Cpu cpu;
        vendor.copy(cpu.vendor, sizeof(cpu.vendor) - 1);
        cpu.avx2 = avx2;
        cpu.avx512 = avx512;
        cpu.avx512bf16 = avx512bf16;
        const char* reason = nullptr;
        const char* name = best_isa(cpu, &reason);
        return std::make_pair(name, reason);
      },
      py::arg("vendor"), py::kw_only(), py::arg("avx2") = false, py::arg("avx512") = false,
      py::arg("avx512bf16") = false);
  m.def("select_isa", [](const std::string& name) { return select_isa(name.c_str()); });
  m.def("compiled_isas", &compiled_isas);
  m.def("cuda_info", &cuda_info);
}

// torch.ops.senseflow_csrc: the CPU update as operators of torch's stable ABI, for callers that hold tensors: C++,
// exported programs. Python goes past the dispatcher, straight to the C interface (senseflow_kernels/_ext.py).
//
// Built against any torch from 2.11 on with TORCH_TARGET_VERSION 2.11, so it loads in all of them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "senseflow_csrc.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

template <class T>
T scalar(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == type && t.is_cpu(), name, " must be one ",
                  type == ScalarType::Long ? "int64" : "fp32", " on the CPU");
  return *(const T*)t.data_ptr();
}
float fp32(const Tensor& t, const char* name) { return scalar<float>(t, ScalarType::Float, name); }

// The rows of a call, tensor by tensor.
struct Rows {
  std::vector<senseflow_row> rows;
  bool stochastic;
  const char* op;

  Rows(const Tensors& theta, const std::string& mode, const std::vector<int64_t>& parameter,
       const std::vector<int64_t>& start, const char* name)
      : rows(theta.size()), stochastic(mode == "stochastic"), op(name) {
    STD_TORCH_CHECK(mode == "fp32" || mode == "nearest" || mode == "split" || stochastic, op,
                    ": mode must be fp32, nearest, split or stochastic, got ", mode);
    STD_TORCH_CHECK(parameter.size() == rows.size() && start.size() == rows.size(), op, ": theta has ", rows.size(),
                    " tensors, parameter ", parameter.size(), ", start ", start.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i] = senseflow_row{};
      rows[i].n = theta[i].numel(), rows[i].parameter = parameter[i], rows[i].start = start[i];
    }
  }

  // An empty list is absent. random: at random where it is bf16 and the mode is stochastic.
  void put(int field, const Tensors& tensors, const char* name, bool random = false) {
    STD_TORCH_CHECK(tensors.empty() || tensors.size() == rows.size(), op, ": theta has ", rows.size(), " tensors, ",
                    name, " ", tensors.size());
    const bool low = field == PHI_LOW || field == THETA_LOW;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& t = tensors[i];
      const ScalarType type = t.scalar_type();
      STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.numel() == rows[i].n, op, ": ", name, "[", i,
                      "] must be contiguous, on the CPU and of theta's size");
      STD_TORCH_CHECK(low ? type == ScalarType::Short
                          : type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                      op, ": ", name, "[", i, "] must be ", low ? "int16" : "fp32, bf16 or fp16");
      rows[i].data[field] = t.data_ptr();
      const int64_t kind = type == ScalarType::BFloat16 ? SENSEFLOW_BF16 : type == ScalarType::Half ? SENSEFLOW_FP16 : 0;
      const bool at_random = random && stochastic && type == ScalarType::BFloat16;
      rows[i].kinds |= low ? 0 : (kind | (at_random ? 8 : 0)) << (4 * field);
    }
  }

  void update(const senseflow_scalars& scalars) const {
    const int32_t error =
        senseflow_update_cpu(rows.data(), (int64_t)rows.size(), &scalars, torch_parallel_for, nullptr);
    STD_TORCH_CHECK(error == 0, op, ": a low half beside a tensor that is not bf16, a gradient without moments, or a "
                    "negative start");
  }
};

void lerp_(const Tensors phi, const Tensors phi_low, const Tensors theta, const Tensor lam, const std::string mode,
           int64_t seed, const Tensor step, const std::vector<int64_t> parameter, const std::vector<int64_t> start) {
  Rows rows(theta, mode, parameter, start, "lerp_");
  rows.put(PHI, phi, "phi", true);
  rows.put(PHI_LOW, phi_low, "phi_low");
  rows.put(THETA, theta, "theta");
  senseflow_scalars s{};
  s.seed = seed, s.step = scalar<int64_t>(step, ScalarType::Long, "step");
  s.phi_weight = 1.0f - fp32(lam, "lam");
  rows.update(s);
}

void adamw_(const Tensors theta, const Tensors theta_low, const Tensors grad, const Tensors m, const Tensors v,
            const Tensors phi, const Tensors phi_low, const Tensors ema, const Tensor lr, const Tensor step,
            const Tensor lam, const Tensor ema_decay, const Tensor grad_scale, const Tensor found_inf, double beta1,
            double beta2, double eps, double weight_decay, const std::string mode, int64_t seed,
            const std::vector<int64_t> parameter, const std::vector<int64_t> start) {
  if (fp32(found_inf, "found_inf") != 0) return;
  Rows rows(theta, mode, parameter, start, "adamw_");
  rows.put(THETA, theta, "theta", true);
  rows.put(THETA_LOW, theta_low, "theta_low");
  rows.put(GRAD, grad, "grad");
  rows.put(MOMENT, m, "m", true);
  rows.put(SQUARE, v, "v", true);
  rows.put(PHI, phi, "phi", true);
  rows.put(PHI_LOW, phi_low, "phi_low");
  rows.put(EMA, ema, "ema");
  const senseflow_scalars s{
      fp32(lr, "lr"), beta1, beta2, eps, weight_decay, fp32(grad_scale, "grad_scale"),
      scalar<int64_t>(step, ScalarType::Long, "step"), seed, 1.0f - fp32(lam, "lam"), 1.0f - fp32(ema_decay, "ema_decay"),
  };
  rows.update(s);
}

}  // namespace

STABLE_TORCH_LIBRARY(senseflow_csrc, library) {
  library.def(
      "lerp_(Tensor(a!)[] phi, Tensor(b!)[] phi_low, Tensor[] theta, Tensor lam, str mode, int seed, Tensor step, "
      "int[] parameter, int[] start) -> ()");
  library.def(
      "adamw_(Tensor(a!)[] theta, Tensor(b!)[] theta_low, Tensor[] grad, Tensor(c!)[] m, Tensor(d!)[] v, "
      "Tensor(e!)[] phi, Tensor(f!)[] phi_low, Tensor(g!)[] ema, Tensor lr, Tensor step, Tensor lam, Tensor ema_decay, "
      "Tensor grad_scale, Tensor found_inf, float beta1, float beta2, float eps, float weight_decay, str mode, int seed, "
      "int[] parameter, int[] start) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(senseflow_csrc, CPU, library) {
  library.impl("lerp_", TORCH_BOX(&lerp_));
  library.impl("adamw_", TORCH_BOX(&adamw_));
}

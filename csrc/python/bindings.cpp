// refine_ext._C: the divergence table and the formulas of csrc/math on NumPy arrays, and what was built.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <string>

#include "../cpu/dispatch.h"
#include "../math/density_ratio.h"
#include "../math/philox.h"
#include "build_info.h"

namespace py = pybind11;
namespace {

using namespace refine_ext;

constexpr const char* kNames[] = {"kl",           "reverse_kl",  "jensen_shannon",    "gan",
                                  "pearson_chi2", "neyman_chi2", "squared_hellinger", "jeffreys",
                                  "alpha",        "logit"};
static_assert(std::size(kNames) == kDivergences);

Family family_of(int divergence, double alpha) {
  if (divergence < 0 || divergence >= kDivergences) throw py::value_error("unknown divergence code");
  return make_family(static_cast<Divergence>(divergence), alpha);
}

double log_ratio_of(const Family& family, double t) { return log_ratio_at(family, t, 0.0); }

// f(u) = u f'(u) - f*(f'(u)); the limit at u = 0 is -f*(f'(0)).
double generator_of(const Family& family, double u) {
  const double x = std::log(u);
  const double dual = conjugate(family, x);
  return u == 0.0 ? -dual : u * dual_output(family, x) - dual;
}

double dual_output_of(const Family& family, double x) { return dual_output(family, x); }
double score_factor_of(const Family& family, double x) { return score_factor(family, x); }
double conjugate_of(const Family& family, double x) { return conjugate(family, x); }

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

template <double (*kFormula)(const Family&, double)>
py::object apply(int divergence, double alpha, const Array& values) {
  const Family family = family_of(divergence, alpha);
  return py::vectorize([family](double value) { return kFormula(family, value); })(values);
}

py::dict build_info() {
  py::dict info;
  info["version"] = REFINE_EXT_VERSION;
  info["compiler"] = REFINE_EXT_COMPILER;
  info["cxx_flags"] = REFINE_EXT_CXX_FLAGS;
  info["torch_built_against"] = REFINE_EXT_TORCH_VERSION;
  info["cuda"] = CUDA_BUILT != 0;
  info["cuda_absent"] = REFINE_EXT_CUDA_ABSENT;
  info["cuda_version"] = CUDA_BUILT ? REFINE_EXT_CUDA_VERSION : "";
  info["cuda_architectures"] = py::str(CUDA_BUILT ? REFINE_EXT_CUDA_ARCHITECTURES : "").attr("split")();
  info["simd_compiled"] = simd_compiled();
  info["simd_level"] = simd_name(simd_level());
  return info;
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const auto block = philox4x32<uint32_t>({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {block.word[0], block.word[1], block.word[2], block.word[3]};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Constants, formulas on NumPy float64 arrays, and build facts of refine_ext.";
  m.def("build_info", &build_info, "What was built, and which SIMD level this process runs.");
  m.def(
      "divergence_codes",
      [] {
        py::dict codes;
        for (int code = 0; code < kDivergences; ++code) codes[kNames[code]] = code;
        return codes;
      },
      "Name to code of every divergence, and `logit`.");
  m.def(
      "family",
      [](int divergence, double alpha) {
        const Family family = family_of(divergence, alpha);
        py::dict result;
        constexpr const char* kForms[] = {"power", "power", "power",    "power",
                                          "power", "power", "logistic", "lambert"};
        result["form"] = kForms[static_cast<int>(family.form)];
        result["exponent"] = family.c;
        result["scale"] = family.k;
        result["tangent"] = family.tangent;
        result["supremum"] = family.supremum;
        return result;
      },
      py::arg("divergence"), py::arg("alpha") = 0.0,
      "Constants of a family: form, exponent and scale of its score factor, f'(1), sup dom f*.");
  m.def("generator", &apply<generator_of>, "f(u) of ratios u >= 0.");
  m.def("dual_output", &apply<dual_output_of>, "f'(e^x) of log-ratios x.");
  m.def("log_ratio", &apply<log_ratio_of>, "log (f*)'(t) of outputs t, no shift.");
  m.def("conjugate", &apply<conjugate_of>, "f*(f'(e^x)) of log-ratios x.");
  m.def("score_factor", &apply<score_factor_of>, "(f*)''/(f*)' at log-ratios x.");
  m.def("philox", &philox, py::arg("counter"), py::arg("key"),
        "Philox4x32-10: four 32-bit words from a counter of four and a key of two.");
}

// From a run-time form to the template that serves it.
#pragma once

#include "density_ratio.h"
#include "simd_storage.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

template <Form kForm>
struct FormTag {
  static constexpr Form value = kForm;
};

template <class F>
auto with_form(Form form, F&& f) {
  switch (form) {
    case Form::exponential:
      return f(FormTag<Form::exponential>{});
    case Form::reciprocal:
      return f(FormTag<Form::reciprocal>{});
    case Form::inverse_square:
      return f(FormTag<Form::inverse_square>{});
    case Form::inverse_sqrt:
      return f(FormTag<Form::inverse_sqrt>{});
    case Form::linear:
      return f(FormTag<Form::linear>{});
    case Form::logistic:
      return f(FormTag<Form::logistic>{});
    case Form::lambert:
      return f(FormTag<Form::lambert>{});
    default:
      return f(FormTag<Form::power>{});
  }
}

}  // namespace
}  // namespace refine_ext::REFINE_EXT_ISA

// The CPU kernels of the LSTM with zoneout and layer normalisation: lstm_kernel.h, and what these
// add. No projection.
#pragma once

#include "../common/heads.h"
#include "lstm_kernel.h"

namespace seqmem::lstm_regularized {

using lstm::Plan;
using lstm::Shape;

// How much of the value that enters a step a unit keeps: `p` of it, or, where drawn, all of it with
// that probability, by counting from the seed (common/dropout.h; a row's number is t * B + b).
struct Zoneout : Dropout {
  bool drawn;
};

// N(v) = gain (v - mean v) / sqrt(var v + kNormEpsilon); all null without layer normalisation.
inline constexpr double kNormEpsilon = 1e-5;
struct Norms {
  const void* gain_ih;  // [4H], of W_ih x
  const void* gain_hh;  // [4H], of W_hh h
  const void* gain_c;   // [H], of the new c within h = o tanh c
  const void* shift_c;  // [H]
};

// What the forward saves for the backward, all null without norms or where it saves nothing: values
// normalised, without gain and shift, so that what 16 bits round does not grow by 1 / deviation.
struct NormsSaved {
  void* x;       // [rows, 4H], of W_ih x
  void* v;       // [rows, 4H], of W_hh h
  void* c;       // [rows, H], of the new c
  void* scales;  // [rows, 3] of double where the storage type is, else float: their 1 / deviation
};

struct Forward {
  lstm::Forward layer;
  Norms norms;
  Zoneout zoneout_h, zoneout_c;
  NormsSaved saved;
  void* workspace;
};

struct Backward {
  lstm::Backward layer;
  Norms norms;
  Zoneout zoneout_h, zoneout_c;
  NormsSaved saved;
  void* grad_gain_ih;  // [4H], or null, as are the next
  void* grad_gain_hh;  // [4H]
  void* grad_gain_c;   // [H]
  void* grad_shift_c;  // [H]
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<Forward, Shape, Plan> forward_kernel;
                    extern const Kernel<Backward, Shape, Plan> backward_kernel;)

}  // namespace seqmem::lstm_regularized

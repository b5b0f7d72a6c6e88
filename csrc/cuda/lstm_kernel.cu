// Pointwise LSTM kernels; see the header. One thread computes `Width` neighbouring units of one
// batch row, so that each of its loads and stores is one vector where the addresses allow.
//
// Floor of the forward kernel per unit: 4 pre-activations and c in, h and c out, 4 gates and c more
// when training: 7 to 12 elements for about 40 flops; backward 13 elements for about 30. Memory
// sets the speed of large steps, the launch that of small ones.
#include "lstm_kernel.h"

#include <algorithm>

#include "common.h"

namespace seqmem::cuda {
namespace {

// The batch row and first unit of this thread; the grid's y strides over units.
struct Place {
  int64_t b, length;
  bool inside, active;

  __device__ explicit Place(const Step& step) {
    b = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    inside = b < step.batch;
    length = !inside ? 0 : step.lengths ? step.lengths[b] : step.steps;
    active = step.t < length;
  }
};

__device__ int64_t first_unit() { return int64_t(blockIdx.y) * blockDim.x + threadIdx.x; }
__device__ int64_t unit_stride() { return int64_t(gridDim.y) * blockDim.x; }

__device__ bool cut_after(const Step& step, const Place& place) {
  const int64_t seam = step.t + (step.reverse ? 0 : 1);
  return step.reset && step.cut_after_row >= 0 && seam < place.length &&
         step.reset[step.cut_after_row + place.b * step.row_stride];
}

__device__ bool cut_before(const Step& step, const Place& place) {
  const int64_t seam = step.t + (step.reverse ? 1 : 0);
  return step.reset && step.cut_before_row >= 0 && seam < place.length &&
         step.reset[step.cut_before_row + place.b * step.row_stride];
}

template <class T, class C, int Width>
__global__ void __launch_bounds__(128) forward_kernel(Step step, StepForward a) {
  using A = typename Arithmetic<T>::type;
  const Place place(step);
  if (!place.inside) return;
  const int64_t H = step.hidden, row = step.row + place.b * step.row_stride;
  const bool idle = !place.active, cut = cut_after(step, place);
  for (int64_t n = first_unit() * Width; n < H; n += unit_stride() * Width) {
    A z[4][Width], h[Width], c[Width] = {};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      read<Width, T>(z[q], a.z, (row * 4 + q) * H + n);
      add<Width, T>(z[q], a.bias_ih, q * H + n);
      add<Width, T>(z[q], a.bias_hh, q * H + n);
    }
    add<Width, C>(c, a.c_in, place.b * H + n);
#pragma unroll
    for (int k = 0; k < Width; ++k) {
      const A i = z[0][k] = sigmoid(z[0][k]);
      const A f = z[1][k] = sigmoid(z[1][k]);
      const A g = z[2][k] = tangent(z[2][k]);
      const A o = z[3][k] = sigmoid(z[3][k]);
      c[k] = f * c[k] + i * g;
      h[k] = o * tangent(c[k]);
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) write<Width, T>(a.gates, (row * 4 + q) * H + n, z[q], idle);
    write<Width, T>(a.cells, row * H + n, c, idle);
    write<Width, T>(a.output, row * H + n, h, idle);
    if (idle) continue;
    write<Width, C>(a.c_out, place.b * H + n, c, cut);
    write<Width, T>(a.h_out, place.b * H + n, h, cut);
  }
}

template <class T, class C, int Width>
__global__ void __launch_bounds__(128) backward_kernel(Step step, StepBackward a) {
  using A = typename Arithmetic<T>::type;
  const Place place(step);
  if (!place.inside) return;
  const int64_t H = step.hidden, row = step.row + place.b * step.row_stride;
  const int64_t first = step.reverse ? place.length - 1 : 0;
  const int64_t last = step.reverse ? 0 : place.length - 1;
  const bool idle = !place.active;
  const bool after = cut_after(step, place), before = cut_before(step, place);
  for (int64_t n = first_unit() * Width; n < H; n += unit_stride() * Width) {
    const int64_t state = place.b * H + n, unit = row * H + n, gate = row * 4 * H + n;
    A dz_i[Width] = {}, dz_f[Width] = {}, dz_g[Width] = {}, dz_o[Width] = {};
    if (!idle) {
      A i[Width], f[Width], g[Width], o[Width], c[Width];
      read<Width, T>(i, a.gates, gate);
      read<Width, T>(f, a.gates, gate + H);
      read<Width, T>(g, a.gates, gate + 2 * H);
      read<Width, T>(o, a.gates, gate + 3 * H);
      read<Width, T>(c, a.cells, unit);
      A c_prev[Width] = {}, d_h[Width] = {}, d_c[Width] = {};
      if (!before) {
        if (step.t == first)
          add<Width, T>(c_prev, a.cx, state);
        else
          add<Width, T>(c_prev, a.cells, (step.prev_row + place.b * step.row_stride) * H + n);
      }
      add<Width, T>(d_h, a.grad_output, unit);
      if (step.t == last)
        add<Width, T>(d_h, a.grad_hy, state);
      else if (!after)
        add<Width, T>(d_h, a.from_next, state);
      add<Width, C>(d_c, a.d_c_in, state);
      add<Width, T>(d_c, a.grad_cells, unit);
      // By the activated gates first, then through their slopes.
      add<Width, T>(dz_i, a.grad_gates, gate);
      add<Width, T>(dz_f, a.grad_gates, gate + H);
      add<Width, T>(dz_g, a.grad_gates, gate + 2 * H);
      add<Width, T>(dz_o, a.grad_gates, gate + 3 * H);
#pragma unroll
      for (int k = 0; k < Width; ++k) {
        const A tanh_c = tangent(c[k]);
        d_c[k] += d_h[k] * o[k] * (A(1) - tanh_c * tanh_c);
        dz_i[k] = (dz_i[k] + d_c[k] * g[k]) * i[k] * (A(1) - i[k]);
        dz_f[k] = (dz_f[k] + d_c[k] * c_prev[k]) * f[k] * (A(1) - f[k]);
        dz_g[k] = (dz_g[k] + d_c[k] * i[k]) * (A(1) - g[k] * g[k]);
        dz_o[k] = (dz_o[k] + d_h[k] * tanh_c) * o[k] * (A(1) - o[k]);
        d_c[k] *= f[k];
      }
      write<Width, C>(a.d_c_out, state, d_c, before);
    }
    write<Width, T>(a.dz, gate, dz_i, false);
    write<Width, T>(a.dz, gate + H, dz_f, false);
    write<Width, T>(a.dz, gate + 2 * H, dz_g, false);
    write<Width, T>(a.dz, gate + 3 * H, dz_o, false);
  }
}

// Blocks of 128 threads; rows along x, whose limit is 2^31 - 1, and units along y.
template <class Arguments>
cudaError_t launch(void (*kernel)(Step, Arguments), const Step& step, const Arguments& arguments,
                   int64_t width, cudaStream_t stream) {
  if (step.batch == 0) return cudaSuccess;
  const int64_t vectors = step.hidden / width;
  unsigned x = 1;
  while (x < 128 && x < vectors) x *= 2;
  const unsigned y = 128 / x;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned((step.batch + y - 1) / y),
                        unsigned(std::min<int64_t>((vectors + x - 1) / x, 65535)));
  config.blockDim = dim3(x, y);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, step, arguments);
}

template <class T, class C>
cudaError_t forward(const Step& step, const StepForward& a, cudaStream_t stream) {
  constexpr int kWidth = sizeof(C) == 8 ? 2 : 4;
  const bool fast =
      step.hidden % kWidth == 0 &&
      aligned({a.z, a.bias_ih, a.bias_hh, a.c_in, a.c_out, a.h_out, a.output, a.gates, a.cells});
  return fast ? launch(forward_kernel<T, C, kWidth>, step, a, kWidth, stream)
              : launch(forward_kernel<T, C, 1>, step, a, 1, stream);
}

template <class T, class C>
cudaError_t backward(const Step& step, const StepBackward& a, cudaStream_t stream) {
  constexpr int kWidth = sizeof(C) == 8 ? 2 : 4;
  const bool fast = step.hidden % kWidth == 0 &&
                    aligned({a.grad_output, a.grad_hy, a.from_next, a.d_c_in, a.d_c_out,
                             a.grad_gates, a.grad_cells, a.cx, a.gates, a.cells, a.dz});
  return fast ? launch(backward_kernel<T, C, kWidth>, step, a, kWidth, stream)
              : launch(backward_kernel<T, C, 1>, step, a, 1, stream);
}

}  // namespace

cudaError_t lstm_forward_step(Storage storage, const Step& step, const StepForward& a,
                              cudaStream_t stream) {
  switch (storage) {
    case Storage::Float: return forward<float, float>(step, a, stream);
    case Storage::Double: return forward<double, double>(step, a, stream);
    case Storage::BFloat16:
      return a.wide_c ? forward<__nv_bfloat16, float>(step, a, stream)
                      : forward<__nv_bfloat16, __nv_bfloat16>(step, a, stream);
    case Storage::Half:
      return a.wide_c ? forward<__half, float>(step, a, stream)
                      : forward<__half, __half>(step, a, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t lstm_backward_step(Storage storage, const Step& step, const StepBackward& a,
                               cudaStream_t stream) {
  switch (storage) {
    case Storage::Float: return backward<float, float>(step, a, stream);
    case Storage::Double: return backward<double, double>(step, a, stream);
    case Storage::BFloat16:
      return a.wide_c ? backward<__nv_bfloat16, float>(step, a, stream)
                      : backward<__nv_bfloat16, __nv_bfloat16>(step, a, stream);
    case Storage::Half:
      return a.wide_c ? backward<__half, float>(step, a, stream)
                      : backward<__half, __half>(step, a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace seqmem::cuda

// Small things that every kernel source needs: padded rows, scratch arrays, entry points.
#pragma once

#include "isa.h"
#include "vec_math.h"

namespace seqmem {
namespace {

template <class I>
SEQMEM_INLINE I min(I a, I b) {
  return b < a ? b : a;
}
template <class I>
SEQMEM_INLINE I max(I a, I b) {
  return a < b ? b : a;
}
SEQMEM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// n rounded up to whole vectors.
template <class C>
SEQMEM_INLINE int64_t padded(int64_t n) {
  return ceil_div(n, kLanes<C>) * kLanes<C>;
}

// Hands out 64-byte aligned arrays from one block; with a null block it only counts.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}

  template <class X>
  X* array(int64_t count) {
    const int64_t offset = used_;
    used_ += (count * static_cast<int64_t>(sizeof(X)) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<X*>(base_ + offset);
  }

  // place() takes the arrays of one thread; each of `threads` gets its own, and place() is left
  // with those of `thread`.
  template <class Place>
  void per_thread(int thread, int threads, Place&& place) {
    const int64_t begin = used_;
    place();
    const int64_t size = used_ - begin;
    used_ = begin + thread * size;
    place();
    used_ = begin + threads * size;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// to[0..padded(n)-1] = from[0..n-1], then zeros.
template <class S>
SEQMEM_INLINE void load_row(compute_t<S>* to, const S* from, int64_t n) {
  constexpr int L = kLanes<compute_t<S>>;
  for (int64_t i = 0; i < n; i += L) store(to + i, load_n(from + i, static_cast<int>(n - i)));
}

template <class S>
SEQMEM_INLINE void store_row(S* to, const compute_t<S>* from, int64_t n) {
  constexpr int L = kLanes<compute_t<S>>;
  for (int64_t i = 0; i < n; i += L) store_n(to + i, load(from + i), static_cast<int>(n - i));
}

// from[0], from[stride], ...: n elements, zero beyond.
template <class S>
SEQMEM_INLINE Vec<compute_t<S>> load_strided(const S* from, int64_t stride, int n) {
  constexpr int L = kLanes<compute_t<S>>;
  if (stride == 1) return load_n(from, n);
  S lanes[L] = {};
  for (int i = 0; i < min(n, L); ++i) lanes[i] = from[i * stride];
  return load(lanes);
}

// The storage types that a kernel is compiled for.
enum class Types { All, FloatAndDouble, BFloat16 };

// Calls f with a value of the storage type.
template <Types types = Types::All, class F>
SEQMEM_INLINE int64_t with_storage(Storage storage, F&& f) {
  if constexpr (types == Types::BFloat16) {
    return f(bf16{});
  } else {
    switch (storage) {
      case Storage::Float: return f(float{});
      case Storage::Double: return f(double{});
      case Storage::BFloat16:
        if constexpr (types == Types::All) return f(bf16{});
        break;
      case Storage::Half:
        if constexpr (types == Types::All) return f(fp16{});
        break;
    }
    return 0;
  }
}

// The table of a kernel that is written as a class Run<S> of the storage type S: constructed from
// (shapes..., arguments, thread, threads, barrier); place(base) gives its buffers their places and
// returns the bytes used, with a null base too; run() does one thread's part.
template <template <class> class Run, Types types, class Arguments, class... Shapes>
struct Entry {
  static int64_t workspace(Storage storage, const Shapes&... shapes, const Arguments& a,
                           int threads) {
    return with_storage<types>(storage, [&](auto tag) {
      SpinBarrier barrier(threads);
      return Run<decltype(tag)>(shapes..., a, 0, threads, barrier).place(nullptr);
    });
  }

  static void run(Storage storage, const Shapes&... shapes, const Arguments& a, int thread,
                  int threads, SpinBarrier& barrier) {
    with_storage<types>(storage, [&](auto tag) {
      Run<decltype(tag)> call(shapes..., a, thread, threads, barrier);
      call.place(static_cast<char*>(a.workspace));
      call.run();
      return int64_t(0);
    });
  }

  static constexpr Kernel<Arguments, Shapes...> table = {workspace, run};
};

}  // namespace
}  // namespace seqmem

// Reading and writing the memory [N, M] of a batch row, which stays in L2, forward and backward:
//   read            reads = sum_i w_i memory_i, a pass over the memory for each head
//   read_backward   grad_memory_i = sum_h w_hi grad_h;  grad_w_hi = memory_i . grad_h
//   write           memory_i = memory_i (1 - w_i erase) + w_i add, head after head
//   write_backward  writes again, keeping the memory that each head found, then goes back through
//                   the heads: grad_w, grad_erase, grad_add, and grad_memory in place
#include "ntm_addressing_rows.h"

namespace seqmem::ntm_addressing {
namespace {

// One thread's run over batch rows.
template <class S>
class Memory {
  using C = compute_t<S>;
  using Array = typename Rows<C>::Array;
  static constexpr int L = kLanes<C>;

  const Shape& s;
  const Rows<C> rows;
  Staged<S> memory, grad;
  C* earlier;                // [H - 1] padded memories: as every head but the first found it
  C* spare;                  // a padded memory
  C *w, *grad_w;             // [N]
  C *erase, *add;            // [H, M], padded
  C *grad_erase, *grad_add;  // [M], padded

 public:
  explicit Memory(const Shape& s) : s(s), rows(s) {}

  int64_t place(char* base) {
    Carver take(base);
    memory.place(take, rows);
    grad.place(take, rows);
    earlier = take.template array<C>((s.H - 1) * rows.whole_size());
    spare = take.template array<C>(rows.whole_size());
    for (C** a : {&w, &grad_w}) *a = take.template array<C>(padded<C>(s.N));
    for (C** a : {&erase, &add}) *a = take.template array<C>(s.H * width());
    for (C** a : {&grad_erase, &grad_add}) *a = take.template array<C>(width());
    return take.used();
  }

  void read(const S* from, const S* weights, S* reads, int64_t begin, int64_t end) const {
    for (int64_t b = begin; b < end; ++b) {
      const Array array = memory.enter(rows, from + b * s.N * s.M);
      for (int64_t h = b * s.H; h < (b + 1) * s.H; ++h) {
        load_row(weights + h * s.N, w, s.N);
        rows.weighted_sum(array, w, add);
        store_row(reads + h * s.M, add, s.M);
      }
    }
  }

  void read_backward(const S* from, const S* weights, const S* grads, S* grad_memory,
                     S* grad_weights, int64_t begin, int64_t end) const {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t h = 0; h < s.H; ++h)
        load_row(grads + (b * s.H + h) * s.M, add + h * width(), s.M);
      if (grad_memory != nullptr) {
        S* to = grad_memory + b * s.N * s.M;
        const Array array = grad.target(rows, to);
        for (int64_t h = 0; h < s.H; ++h) {
          load_row(weights + (b * s.H + h) * s.N, w, s.N);
          const C* key = add + h * width();
          if (h == 0) {
            rows.template spread<false, false>(array, array, w, key, nullptr, nullptr);
          } else {
            rows.template spread<true, false>(array, array, w, key, nullptr, nullptr);
          }
        }
        grad.leave(rows, array, to);
      }
      if (grad_weights != nullptr) {
        const Array array = memory.enter(rows, from + b * s.N * s.M);
        for (int64_t h = 0; h < s.H; ++h) {
          rows.template similarity<false>(array, add + h * width(), w, nullptr);
          store_row(grad_weights + (b * s.H + h) * s.N, w, s.N);
        }
      }
    }
  }

  void write(const Write& a, S* out, int64_t begin, int64_t end) const {
    for (int64_t b = begin; b < end; ++b) {
      S* to = out + b * s.N * s.M;
      Array from = memory.enter(rows, static_cast<const S*>(a.memory) + b * s.N * s.M);
      const Array array = grad.target(rows, to);
      load_vectors(a, b);
      for (int64_t h = 0; h < s.H; ++h) {
        write_head(a, b, h, from, array);
        from = array;
      }
      grad.leave(rows, array, to);
    }
  }

  void write_backward(const Write& a, const S* grads, const WriteGradients& out, int64_t begin,
                      int64_t end) const {
    for (int64_t b = begin; b < end; ++b) {
      const Array first = memory.enter(rows, static_cast<const S*>(a.memory) + b * s.N * s.M);
      load_vectors(a, b);
      for (int64_t h = 0; h + 1 < s.H; ++h) write_head(a, b, h, found_by(first, h), after(h));
      const Array array = rows.with_room(spare);
      load_row(grads + b * s.N * s.M, spare, s.N * s.M);
      for (int64_t h = s.H - 1; h >= 0; --h) {
        const int64_t at = b * s.H + h;
        load_row(static_cast<const S*>(a.weights) + at * s.N, w, s.N);
        rows.write_backward(found_by(first, h), array, w, erase + h * width(), add + h * width(),
                            grad_w, grad_erase, grad_add);
        keep(out.weights, at * s.N, grad_w, s.N);
        keep(out.erase, at * s.M, grad_erase, s.M);
        keep(out.add, at * s.M, grad_add, s.M);
      }
      keep(out.memory, b * s.N * s.M, spare, s.N * s.M);
    }
  }

 private:
  int64_t width() const { return padded<C>(s.M); }

  void load_vectors(const Write& a, int64_t b) const {
    for (int64_t h = 0; h < s.H; ++h) {
      const int64_t from = (b * s.H + h) * s.M;
      load_row(static_cast<const S*>(a.erase) + from, erase + h * width(), s.M);
      load_row(static_cast<const S*>(a.add) + from, add + h * width(), s.M);
    }
  }

  void write_head(const Write& a, int64_t b, int64_t h, const Array& from, const Array& to) const {
    load_row(static_cast<const S*>(a.weights) + (b * s.H + h) * s.N, w, s.N);
    rows.write(from, to, w, erase + h * width(), add + h * width());
  }

  Array after(int64_t h) const { return rows.with_room(earlier + h * rows.whole_size()); }
  Array found_by(const Array& first, int64_t h) const { return h == 0 ? first : after(h - 1); }

  static void keep(void* to, int64_t at, const C* from, int64_t n) {
    if (to != nullptr) store_row(static_cast<S*>(to) + at, from, n);
  }
};

template <class F>
void with_memory(Storage storage, const Shape& s, char* scratch, F&& f) {
  with_storage(storage, [&](auto tag) {
    Memory<decltype(tag)> run(s);
    run.place(scratch);
    f(run, tag);
    return int64_t(0);
  });
}

int64_t workspace(Storage storage, const Shape& s) {
  return with_storage(storage, [&](auto tag) { return Memory<decltype(tag)>(s).place(nullptr); });
}

void read(Storage storage, const Shape& s, const void* memory, const void* weights, void* reads,
          int64_t begin, int64_t end, char* scratch) {
  with_memory(storage, s, scratch, [&](const auto& run, auto tag) {
    using S = decltype(tag);
    run.read(static_cast<const S*>(memory), static_cast<const S*>(weights), static_cast<S*>(reads),
             begin, end);
  });
}

void read_backward(Storage storage, const Shape& s, const void* memory, const void* weights,
                   const void* grad, void* grad_memory, void* grad_weights, int64_t begin,
                   int64_t end, char* scratch) {
  with_memory(storage, s, scratch, [&](const auto& run, auto tag) {
    using S = decltype(tag);
    run.read_backward(static_cast<const S*>(memory), static_cast<const S*>(weights),
                      static_cast<const S*>(grad), static_cast<S*>(grad_memory),
                      static_cast<S*>(grad_weights), begin, end);
  });
}

void write(Storage storage, const Shape& s, const Write& a, void* out, int64_t begin, int64_t end,
           char* scratch) {
  with_memory(storage, s, scratch, [&](const auto& run, auto tag) {
    run.write(a, static_cast<decltype(tag)*>(out), begin, end);
  });
}

void write_backward(Storage storage, const Shape& s, const Write& a, const void* grad,
                    const WriteGradients& out, int64_t begin, int64_t end, char* scratch) {
  with_memory(storage, s, scratch, [&](const auto& run, auto tag) {
    run.write_backward(a, static_cast<const decltype(tag)*>(grad), out, begin, end);
  });
}

}  // namespace

namespace SEQMEM_ISA {
const MemoryKernel memory_kernel = {workspace, read, read_backward, write, write_backward};
}  // namespace SEQMEM_ISA

}  // namespace seqmem::ntm_addressing

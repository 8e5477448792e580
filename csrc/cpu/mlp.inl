// The four row passes of the chunked MLP, and plain column sums.
#include "grn.inl"

namespace cnx {
namespace CNX_ISA {

template <class T, Activation kAct>
void gelu_statistics_as(const GeluStatistics& p, const Threads& threads) {
  const RowBlocks blocks(p.segments);
  Scratch<Acc<T>> squares(p.segments.count * p.channels);
  if (p.h)
    square_sums<T, kAct, true>(p, blocks, squares.get(), threads);
  else
    square_sums<T, kAct, false>(p, blocks, squares.get(), threads);
  grn_scale(p, squares.get());
}

// `count` equal values, in place of an absent scale or beta.
template <class A>
class Filled {
 public:
  Filled(int64_t count, A value) : data_(count) {
    for (int64_t i = 0; i < count; ++i) data_.get()[i] = value;
  }
  const A* get() const { return data_.get(); }

 private:
  Scratch<A> data_;
};

template <class T, Activation kAct>
void gelu_scale_as(const GeluScale& given, const Threads& threads) {
  using A = Acc<T>;
  const Filled<A> ones(given.scale ? 0 : given.segments.count * given.channels, A(1));
  const Filled<A> zeros(given.beta ? 0 : given.channels, A(0));
  GeluScale p = given;
  if (!p.scale) p.scale = ones.get();
  if (!p.beta) p.beta = zeros.get();
  scale_rows<T, kAct>(p, RowBlocks(p.segments), threads);
}

template <class T, Activation kAct>
void mlp_backward_statistics_as(const MlpBackwardStatistics& p, const Threads& threads) {
  using A = Acc<T>;
  if (p.t) return grn_gradient(p, in<A>(p.t), p.channels);
  Scratch<A> sums(p.segments.count * p.channels);
  gradient_sums<T, kAct, 1>(p, RowBlocks(p.segments), sums.get(), threads);
  grn_gradient(p, sums.get(), p.channels);
}

template <class T, Activation kAct>
void mlp_backward_pointwise_as(const MlpBackwardPointwise& given, const Threads& threads) {
  using A = Acc<T>;
  const RowBlocks blocks(given.segments);
  if (!given.hs) return gradient_rows<T, kAct, false, true>(given, blocks, threads);
  const Filled<A> zeros(given.beta ? 0 : given.channels, A(0));
  MlpBackwardPointwise p = given;
  if (!p.beta) p.beta = zeros.get();
  gradient_rows<T, kAct, true, true>(p, blocks, threads);
}

template <class T>
void column_sum_as(const ColumnSum& p, const Threads& threads) {
  const int64_t channels = p.channels;
  const RowBlocks blocks({.rows_per_slot = 1, .count = 1, .rows = p.rows});
  Scratch<Acc<T>> partial(blocks.size() * channels);
  parallel_for(threads, blocks.size(), 4, [&](int64_t begin, int64_t end) {
    const T* x = in<T>(p.x);
    for (int64_t b = begin; b < end; ++b)
      walk_block<T, 1>(
          blocks[b], channels, partial.get() + b * channels,
          [=](auto lanes, int64_t r, int64_t c, Vec<T>* sums) { sums[0] += lanes.load(x + r * channels + c); });
  });
  sum_blocks(blocks.size(), partial.get(), channels, out<Acc<T>>(p.sums));
}

inline void gelu_statistics(const GeluStatistics& p, const Threads& threads) {
  with_types(p.dtype, p.activation,
             [&](auto type, auto act) { gelu_statistics_as<decltype(type), decltype(act)::value>(p, threads); });
}
inline void gelu_scale(const GeluScale& p, const Threads& threads) {
  with_types(p.dtype, p.activation,
             [&](auto type, auto act) { gelu_scale_as<decltype(type), decltype(act)::value>(p, threads); });
}
inline void mlp_backward_statistics(const MlpBackwardStatistics& p, const Threads& threads) {
  with_types(p.dtype, p.activation, [&](auto type, auto act) {
    mlp_backward_statistics_as<decltype(type), decltype(act)::value>(p, threads);
  });
}
inline void mlp_backward_pointwise(const MlpBackwardPointwise& p, const Threads& threads) {
  with_types(p.dtype, p.activation,
             [&](auto type, auto act) { mlp_backward_pointwise_as<decltype(type), decltype(act)::value>(p, threads); });
}
inline void column_sum(const ColumnSum& p, const Threads& threads) {
  CNX_DISPATCH(p.dtype, column_sum_as, p, threads)
}

}  // namespace CNX_ISA
}  // namespace cnx

// A difficulty router, for CPUs; see router.py for what it computes.
//
// Tokens are taken in blocks that do not depend on the number of threads. The gradients of
// parameters are summed block by block, then over the blocks in their order.

#include "vector_math.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace {

using moxe::for_each_vector;
using moxe::load;
using moxe::store;
using moxe::Vec;
using moxe::Wide;

constexpr int64_t kTokensAtOnce = 4;
// Of a block, but for as many tokens that there would be more blocks than this: each needs sums
// of its own for all parameters.
constexpr int64_t kTokensOfBlock = 32;
constexpr int64_t kMaxBlocks = 64;

struct Shape {
  int64_t tokens, dim, experts, mlstm_experts, top_k;

  // Experts, and the difficulty.
  int64_t scores() const { return experts + 1; }
};

struct Block {
  int64_t begin, end;
};

std::vector<Block> cut_tokens(int64_t num_tokens) {
  const int64_t size = std::max(kTokensOfBlock, (num_tokens + kMaxBlocks - 1) / kMaxBlocks);
  std::vector<Block> blocks;
  for (int64_t begin = 0; begin < num_tokens; begin += size)
    blocks.push_back({begin, std::min(begin + size, num_tokens)});
  return blocks;
}

// Copies numbers to where they are wider.
template <typename T>
void widen(const T* from, int64_t size, Wide<T>* to) {
  for_each_vector<Wide<T>>(
      0, size, [&](int64_t i, int64_t n) { store(load(from + i, n), to + i, n); });
}

template <typename T>
struct Params {
  const T *weight, *bias, *difficulty_weight, *difficulty_bias;  // bias: null if there is none

  // (scores, dim)
  std::vector<Wide<T>> all_weights(const Shape& s) const {
    std::vector<Wide<T>> all(s.scores() * s.dim);
    widen(weight, s.experts * s.dim, all.data());
    widen(difficulty_weight, s.dim, all.data() + s.experts * s.dim);
    return all;
  }

  Wide<T> bias_of(const Shape& s, int64_t score) const {
    if (score == s.experts) return *difficulty_bias;
    return bias == nullptr ? Wide<T>(0) : Wide<T>(bias[score]);
  }
};

// Of each token; those of choices are (tokens, top_k), that of the difficulty (tokens).
template <typename W>
struct Results {
  W *logits, *biased, *probs, *unbiased, *difficulty;
  int64_t* indices;
  W* weights;
};

// Gradients of results; null if all are 0.
template <typename W>
struct ResultGrads {
  const W *logits, *biased, *probs, *unbiased, *difficulty, *weights;
};

template <typename T>
struct ParamGrads {
  T *weight, *bias, *difficulty_weight, *difficulty_bias;  // bias: null if there is none
};

template <typename W>
void softmax(int64_t size, const W* x, W* out) {
  const Vec<W> largest(*std::max_element(x, x + size));
  for_each_vector<W>(0, size, [&](int64_t i, int64_t n) {
    store(moxe::exp<W>(load(x + i, n) - largest), out + i, n);
  });

  W total = 0;
  for (int64_t i = 0; i < size; ++i) total += out[i];
  for (int64_t i = 0; i < size; ++i) out[i] /= total;
}

// What the scores of a token say.
template <typename W>
void route(const Shape& s, W scale, const W* scores, int64_t token, const Results<W>& to) {
  W* logits = to.logits + token * s.experts;
  W* biased = to.biased + token * s.experts;
  W* probs = to.probs + token * s.experts;

  const W difficulty = 1 / (1 + std::exp(-scores[s.experts]));
  to.difficulty[token] = difficulty;

  std::copy(scores, scores + s.experts, logits);
  for (int64_t e = 0; e < s.experts; ++e)
    biased[e] = logits[e] + (e < s.mlstm_experts ? scale : -scale) * difficulty;
  softmax(s.experts, biased, probs);
  softmax(s.experts, logits, to.unbiased + token * s.experts);

  int64_t* indices = to.indices + token * s.top_k;
  W* weights = to.weights + token * s.top_k;
  W total = 0;
  for (int64_t k = 0; k < s.top_k; ++k) {
    // Of equal ones the first; of numbers that are none any, but each once.
    int64_t best = -1;
    for (int64_t e = 0; e < s.experts; ++e)
      if ((best < 0 || probs[e] > probs[best]) &&
          std::find(indices, indices + k, e) == indices + k)
        best = e;
    indices[k] = best;
    weights[k] = probs[best];
    total += probs[best];
  }
  for (int64_t k = 0; k < s.top_k; ++k) weights[k] /= total;
}

template <typename T>
void forward(const Shape& s, double scale, int num_threads, const T* hidden,
             const Params<T>& params, const Results<Wide<T>>& to) {
  using W = Wide<T>;
  const std::vector<W> weight = params.all_weights(s);
  const std::vector<Block> blocks = cut_tokens(s.tokens);
  const int64_t num_blocks = blocks.size();

#pragma omp parallel num_threads(num_threads) if (num_blocks > 1)
  {
    std::vector<W> rows(kTokensAtOnce * s.dim), scores(kTokensAtOnce * s.scores());

#pragma omp for schedule(static)
    for (int64_t b = 0; b < num_blocks; ++b)
      for (int64_t token = blocks[b].begin; token < blocks[b].end; token += kTokensAtOnce) {
        const int64_t num = std::min(kTokensAtOnce, blocks[b].end - token);
        widen(hidden + token * s.dim, num * s.dim, rows.data());

        for (int64_t e = 0; e < s.scores(); ++e) {
          Vec<W> sums[kTokensAtOnce];
          for (Vec<W>& sum : sums) sum = Vec<W>(W(0));
          // Rows that there are not are others.
          for_each_vector<W>(0, s.dim, [&](int64_t i, int64_t n) {
            const Vec<W> w = load(weight.data() + e * s.dim + i, n);
#pragma GCC unroll 4
            for (int64_t t = 0; t < kTokensAtOnce; ++t)
              sums[t] = at::vec::fmadd(w, load(rows.data() + t * s.dim + i, n), sums[t]);
          });
          for (int64_t t = 0; t < num; ++t)
            scores[t * s.scores() + e] = moxe::sum(sums[t]) + params.bias_of(s, e);
        }

        for (int64_t t = 0; t < num; ++t)
          route<W>(s, scale, scores.data() + t * s.scores(), token + t, to);
      }
  }
}

// Adds what the gradient of a softmax is to that of its argument.
template <typename W>
void add_softmax_grad(int64_t size, const W* out, const W* grad, W* to) {
  W dot = 0;
  for (int64_t i = 0; i < size; ++i) dot += out[i] * grad[i];
  for (int64_t i = 0; i < size; ++i) to[i] += out[i] * (grad[i] - dot);
}

// The gradients of a token's scores. `of_probs` is for `experts` numbers.
template <typename W>
void route_backward(const Shape& s, W scale, int64_t token, const Results<const W>& from,
                    const ResultGrads<W>& grads, const int64_t* indices, W* of_probs, W* to) {
  const int64_t at = token * s.experts;
  const W* probs = from.probs + at;

  std::fill(of_probs, of_probs + s.experts, W(0));
  if (grads.probs != nullptr)
    std::copy(grads.probs + at, grads.probs + at + s.experts, of_probs);
  if (grads.weights != nullptr) {
    const int64_t* chosen = indices + token * s.top_k;
    const W* grad = grads.weights + token * s.top_k;
    W total = 0, dot = 0;
    for (int64_t k = 0; k < s.top_k; ++k) {
      total += probs[chosen[k]];
      dot += grad[k] * probs[chosen[k]];
    }
    for (int64_t k = 0; k < s.top_k; ++k)
      of_probs[chosen[k]] += (grad[k] - dot / total) / total;
  }

  std::fill(to, to + s.scores(), W(0));
  if (grads.biased != nullptr) std::copy(grads.biased + at, grads.biased + at + s.experts, to);
  add_softmax_grad(s.experts, probs, of_probs, to);

  W of_difficulty = grads.difficulty == nullptr ? W(0) : grads.difficulty[token];
  for (int64_t e = 0; e < s.experts; ++e)
    of_difficulty += (e < s.mlstm_experts ? scale : -scale) * to[e];
  const W difficulty = from.difficulty[token];
  to[s.experts] = of_difficulty * difficulty * (1 - difficulty);

  if (grads.unbiased != nullptr)
    add_softmax_grad(s.experts, from.unbiased + at, grads.unbiased + at, to);
  for (int64_t e = 0; grads.logits != nullptr && e < s.experts; ++e)
    to[e] += grads.logits[at + e];
}

template <typename T>
void backward(const Shape& s, double scale, int num_threads, const T* hidden,
              const Params<T>& params, const Results<const Wide<T>>& from,
              const int64_t* indices, const ResultGrads<Wide<T>>& grads, T* grad_hidden,
              const ParamGrads<T>& to) {
  using W = Wide<T>;
  const std::vector<W> weight = params.all_weights(s);
  const std::vector<Block> blocks = cut_tokens(s.tokens);
  const int64_t num_blocks = blocks.size();
  // Of each block, those of weights (scores, dim), and of biases (scores).
  const int64_t part_size = s.scores() * (s.dim + 1);
  const std::unique_ptr<W[]> parts(new W[num_blocks * part_size]);

#pragma omp parallel num_threads(num_threads) if (num_blocks > 1)
  {
    std::vector<W> of_probs(s.experts), of_scores(kTokensAtOnce * s.scores());

#pragma omp for schedule(static)
    for (int64_t b = 0; b < num_blocks; ++b) {
      W *part = parts.get() + b * part_size, *of_biases = part + s.scores() * s.dim;
      std::fill(part, part + part_size, W(0));

      for (int64_t token = blocks[b].begin; token < blocks[b].end; token += kTokensAtOnce) {
        const int64_t num = std::min(kTokensAtOnce, blocks[b].end - token);
        for (int64_t t = 0; t < num; ++t)
          route_backward<W>(s, scale, token + t, from, grads, indices, of_probs.data(),
                            of_scores.data() + t * s.scores());
        // Of tokens that there are not.
        std::fill(of_scores.begin() + num * s.scores(), of_scores.end(), W(0));

        for (int64_t t = 0; t < num; ++t)
          for (int64_t e = 0; e < s.scores(); ++e)
            of_biases[e] += of_scores[t * s.scores() + e];

        const T* rows = hidden + token * s.dim;
        for_each_vector<W>(0, s.dim, [&](int64_t i, int64_t n) {
          Vec<W> h[kTokensAtOnce], of_hidden[kTokensAtOnce];
#pragma GCC unroll 4
          for (int64_t t = 0; t < kTokensAtOnce; ++t) {
            h[t] = load(rows + std::min(t, num - 1) * s.dim + i, n);
            of_hidden[t] = Vec<W>(W(0));
          }
          for (int64_t e = 0; e < s.scores(); ++e) {
            const Vec<W> w = load(weight.data() + e * s.dim + i, n);
            Vec<W> sum = load(part + e * s.dim + i, n);
#pragma GCC unroll 4
            for (int64_t t = 0; t < kTokensAtOnce; ++t) {
              const Vec<W> g(of_scores[t * s.scores() + e]);
              sum = at::vec::fmadd(g, h[t], sum);
              of_hidden[t] = at::vec::fmadd(g, w, of_hidden[t]);
            }
            store(sum, part + e * s.dim + i, n);
          }
          for (int64_t t = 0; t < num; ++t)
            store(of_hidden[t], grad_hidden + (token + t) * s.dim + i, n);
        });
      }
    }

#pragma omp for schedule(static)
    for (int64_t e = 0; e < s.scores(); ++e) {
      T* row = e == s.experts ? to.difficulty_weight : to.weight + e * s.dim;
      for_each_vector<W>(0, s.dim, [&](int64_t i, int64_t n) {
        Vec<W> sum(W(0));
        for (int64_t b = 0; b < num_blocks; ++b)
          sum = sum + load(parts.get() + b * part_size + e * s.dim + i, n);
        store(sum, row + i, n);
      });

      W of_bias = 0;
      for (int64_t b = 0; b < num_blocks; ++b)
        of_bias += parts[b * part_size + s.scores() * s.dim + e];
      if (e == s.experts)
        *to.difficulty_bias = of_bias;
      else if (to.bias != nullptr)
        to.bias[e] = of_bias;
    }
  }
}

}  // namespace

// shape: tokens, channels, experts, how many of them are mLSTM experts, choices of each token.
#define MOXE_ROUTER(T, SUFFIX)                                                             \
  extern "C" void moxe_route_forward_##SUFFIX(                                             \
      const int64_t* shape, double scale, int num_threads, const T* hidden,                \
      const T* weight, const T* bias, const T* difficulty_weight, const T* difficulty_bias, \
      Wide<T>* logits, Wide<T>* biased, Wide<T>* probs, Wide<T>* unbiased,                 \
      Wide<T>* difficulty, int64_t* indices, Wide<T>* weights) {                           \
    forward<T>({shape[0], shape[1], shape[2], shape[3], shape[4]}, scale, num_threads,     \
               hidden, {weight, bias, difficulty_weight, difficulty_bias},                 \
               {logits, biased, probs, unbiased, difficulty, indices, weights});           \
  }                                                                                        \
  extern "C" void moxe_route_backward_##SUFFIX(                                            \
      const int64_t* shape, double scale, int num_threads, const T* hidden,                \
      const T* weight, const T* difficulty_weight, const Wide<T>* probs,                   \
      const Wide<T>* unbiased, const Wide<T>* difficulty, const int64_t* indices,          \
      const Wide<T>* grad_logits, const Wide<T>* grad_biased, const Wide<T>* grad_probs,   \
      const Wide<T>* grad_unbiased, const Wide<T>* grad_difficulty,                        \
      const Wide<T>* grad_weights, T* grad_hidden, T* grad_weight, T* grad_bias,           \
      T* grad_difficulty_weight, T* grad_difficulty_bias) {                                \
    backward<T>({shape[0], shape[1], shape[2], shape[3], shape[4]}, scale, num_threads,    \
                hidden, {weight, nullptr, difficulty_weight, nullptr},                     \
                {nullptr, nullptr, probs, unbiased, difficulty, nullptr, nullptr},         \
                indices,                                                                   \
                {grad_logits, grad_biased, grad_probs, grad_unbiased, grad_difficulty,     \
                 grad_weights},                                                            \
                grad_hidden,                                                               \
                {grad_weight, grad_bias, grad_difficulty_weight, grad_difficulty_bias});   \
  }

MOXE_ROUTER(float, float)
MOXE_ROUTER(double, double)
#ifdef __AVX512F__
MOXE_ROUTER(at::BFloat16, bfloat16)
#endif

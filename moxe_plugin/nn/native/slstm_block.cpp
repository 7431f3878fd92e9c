// An sLSTM block on rows in one call, as Python between its many parts would take longer than
// some of them; see slstm_block.py. ../slstm.py has the equations, and ../slstm_parameters.py the
// shapes of parameters, here with E first.
//
// Each function returns 0, or 1 if there is no memory. Tensors are of what the block is in, but
// for those of `float`.

#include "block_products.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using c10::BFloat16;
using moxe::BlockCalls;
using moxe::BlockFunctions;
using moxe::BlockNumbers;
using moxe::BlockProducts;
using moxe::Buffer;
using moxe::Weights;

// In the order of slstm_block.py, as all here.
struct Functions {
  BlockFunctions of_blocks;
  void (*silu_forward)(int64_t num_rows, int64_t dim, int num_threads, const void* joint,
                       void* out);
  void (*silu_backward)(int64_t num_rows, int64_t dim, int num_threads, const void* joint,
                        const void* grad, void* grad_joint);
  void (*scan_forward)(const int64_t* shape, int num_threads, const int64_t* begins,
                       const int64_t* lens, const void* gates_if, const void* gates_zo,
                       const float* bias, const void* weight, const float* c0,
                       const float* log_n0, const float* y0, void* outputs, void* activations,
                       float* c_last, float* log_n_last, float* y_last);
  void (*scan_backward)(const int64_t* shape, int num_threads, const int64_t* begins,
                        const int64_t* lens, const void* weight, const void* outputs,
                        const void* activations, const void* grad_outputs,
                        const float* grad_c_last, const float* grad_log_n_last,
                        const float* grad_y_last, void* grad_if, void* grad_zo, float* grad_bias,
                        float* grad_c0, float* grad_log_n0, float* grad_y0);
  void (*scan_shift)(const int64_t* shape, int num_threads, const int64_t* begins,
                     const int64_t* lens, const void* outputs, const float* y0, void* old);
};

struct Params {
  const void *norm, *conv_weight, *conv_bias, *gate_proj, *recurrent_weight, *gate_bias,
      *out_norm, *ffn_norm, *ffn_up_proj, *ffn_down_proj;
};

// Some may be null: they are not wanted.
struct ParamGrads {
  void *norm, *conv_weight, *conv_bias, *gate_proj, *recurrent_weight, *gate_bias, *out_norm,
      *ffn_norm, *ffn_up_proj, *ffn_down_proj;
};

// What is kept for the way back: (C,M), but statistics (C,1,2) and (C,H,2), activations
// (C,H,5,D), which may be null, `joint` (C,2F) and `gated` (C,F).
struct Rows {
  const void* flat;
  float* stats;
  void *normed, *convolved, *outputs, *activations;
  float* out_stats;
  void* hidden;
  float* ffn_stats;
  void *ffn_normed, *joint, *gated;
};

// Of E times N sequences; see RowBounds of slstm_scan.py. Gradients of a bias come in sums of
// `seqs_of_sum` sequences.
struct Bounds {
  int64_t num_seqs, padded_len, seqs_of_sum;
};

class Block : public BlockCalls {
 public:
  Block(const Functions& functions, const BlockNumbers& numbers, const Bounds& bounds,
        const int64_t* counts, const int64_t* run_lens, const int64_t* begins,
        const int64_t* lens, double eps, double empty, const Params& params)
      : BlockCalls(functions.of_blocks, numbers, counts, run_lens, eps),
        functions_(functions),
        bounds_(bounds),
        begins_(begins),
        lens_(lens),
        empty_(static_cast<float>(empty)),
        params_(params),
        shape_{numbers.num_experts, numbers.num_heads, bounds.num_seqs, bounds.padded_len,
               numbers.model_dim / numbers.num_heads} {}

  void forward(const Rows& rows, void* out) const {
    norm(rows.flat, params_.norm, n_.model_dim, 1, nullptr, rows.normed, rows.stats);
    convolve(rows.normed, n_.model_dim, params_.conv_weight, params_.conv_bias, rows.convolved);
    scan(rows);
    norm(rows.outputs, params_.out_norm, n_.model_dim, n_.num_heads, rows.flat, rows.hidden,
         rows.out_stats);
    norm(rows.hidden, params_.ffn_norm, n_.model_dim, 1, nullptr, rows.ffn_normed,
         rows.ffn_stats);

    BlockProducts up_products(*this, n_.model_dim);
    up_products.add_rows(rows.ffn_normed, up(params_.ffn_up_proj), rows.joint);
    up_products.run();
    functions_.silu_forward(n_.num_rows, n_.inner_dim, threads(), rows.joint, rows.gated);
    copy_rows(rows.hidden, out);
    BlockProducts products(*this, n_.inner_dim);
    products.add_rows(rows.gated, down(params_.ffn_down_proj), out);
    products.run(true);
  }

  void backward(const Rows& rows, const void* grad_out, void* grad_flat,
                const ParamGrads& grads) const {
    Buffer grad_hidden(num_bytes(n_.model_dim));
    feed_forward_backward(rows, grad_out, grad_hidden.bytes(), grads);

    Buffer grad_if(num_bytes(2 * n_.model_dim)), grad_zo(num_bytes(2 * n_.model_dim));
    // What is remembered before the first step.
    const std::vector<float> zeros(memory_size(), 0.0f);
    scan_backward(rows, grad_hidden.bytes(), zeros.data(), grad_if.bytes(), grad_zo.bytes(),
                  grads);

    Buffer old(num_bytes(n_.model_dim));
    Buffer grad_convolved(num_bytes(n_.model_dim)), grad_normed(num_bytes(n_.model_dim));
    const void *halves[] = {grad_if.bytes(), grad_zo.bytes()},
               *inputs[] = {rows.convolved, rows.normed};
    char* of_inputs[] = {grad_convolved.bytes(), grad_normed.bytes()};
    BlockProducts of_weights(*this, max_count()), of_rows(*this, 2 * shape_[4]);
    if (grads.recurrent_weight != nullptr) {
      functions_.scan_shift(shape_, threads(), begins_, lens_, rows.outputs,
                            zeros.data(), old.bytes());
      for (int64_t i = 0; i < 2; ++i)
        of_weights.add_columns(old.bytes(), halves[i],
                               gates(grads.recurrent_weight).half(i, n_.size));
    }
    for (int64_t i = 0; i < 2; ++i) {
      if (grads.gate_proj != nullptr)
        of_weights.add_columns(inputs[i], halves[i], gates(grads.gate_proj).half(i, n_.size));
      of_rows.add_rows(halves[i], gates(params_.gate_proj).half(i, n_.size).transposed(),
                       of_inputs[i]);
    }
    BlockProducts::run(of_weights, of_rows);

    convolve_backward(rows.normed, n_.model_dim, params_.conv_weight, params_.conv_bias,
                      grad_convolved.bytes(), grad_normed.bytes(), grads.conv_weight,
                      grads.conv_bias);
    norm_backward(rows.flat, params_.norm, rows.stats, n_.model_dim, 1, grad_normed.bytes(),
                  grad_hidden.bytes(), grad_flat, grads.norm);
  }

 private:
  // Numbers of c, log(n) or y, (E,N,H,D).
  int64_t memory_size() const { return n_.num_experts * bounds_.num_seqs * n_.model_dim; }

  // (E,H,D,4*D)
  Weights gates(const void* at) const {
    return Weights::dense(at, n_.num_experts, n_.num_heads, shape_[4], 4 * shape_[4]);
  }
  // (E,1,M,2F) and (E,1,F,M)
  Weights up(const void* at) const {
    return Weights::dense(at, n_.num_experts, 1, n_.model_dim, 2 * n_.inner_dim);
  }
  Weights down(const void* at) const {
    return Weights::dense(at, n_.num_experts, 1, n_.inner_dim, n_.model_dim);
  }

  int64_t num_biases() const { return n_.num_experts * 4 * n_.model_dim; }

  void scan(const Rows& rows) const {
    // i and f see the convolution, z and o do not.
    Buffer gates_if(num_bytes(2 * n_.model_dim)), gates_zo(num_bytes(2 * n_.model_dim));
    BlockProducts products(*this, shape_[4]);
    products.add_rows(rows.convolved, gates(params_.gate_proj).half(0, n_.size),
                      gates_if.bytes());
    products.add_rows(rows.normed, gates(params_.gate_proj).half(1, n_.size), gates_zo.bytes());
    products.run();

    Buffer bias(num_biases() * sizeof(float));
    if (is_half())
      std::copy_n(static_cast<const BFloat16*>(params_.gate_bias), num_biases(), bias.floats());
    else
      std::memcpy(bias.bytes(), params_.gate_bias, num_biases() * sizeof(float));
    const int64_t size = memory_size();
    const std::vector<float> zeros(size, 0.0f), empty(size, empty_);
    std::vector<float> c(size), log_n(size), y(size);
    functions_.scan_forward(shape_, threads(), begins_, lens_, gates_if.bytes(), gates_zo.bytes(),
                            bias.floats(), params_.recurrent_weight, zeros.data(), empty.data(),
                            zeros.data(), rows.outputs, rows.activations, c.data(), log_n.data(),
                            y.data());
  }

  // Writes the gradient of `hidden`.
  void feed_forward_backward(const Rows& rows, const void* grad_out, void* grad_hidden,
                             const ParamGrads& grads) const {
    Buffer grad_joint(num_bytes(2 * n_.inner_dim));
    {
      Buffer grad_gated(num_bytes(n_.inner_dim));
      BlockProducts of_weight(*this, max_count()), of_rows(*this, n_.model_dim);
      if (grads.ffn_down_proj != nullptr)
        of_weight.add_columns(rows.gated, grad_out, down(grads.ffn_down_proj));
      of_rows.add_rows(grad_out, down(params_.ffn_down_proj).transposed(), grad_gated.bytes());
      BlockProducts::run(of_weight, of_rows);
      functions_.silu_backward(n_.num_rows, n_.inner_dim, threads(), rows.joint,
                               grad_gated.bytes(), grad_joint.bytes());
    }

    Buffer grad_normed(num_bytes(n_.model_dim));
    BlockProducts of_weight(*this, max_count()), of_rows(*this, 2 * n_.inner_dim);
    if (grads.ffn_up_proj != nullptr)
      of_weight.add_columns(rows.ffn_normed, grad_joint.bytes(), up(grads.ffn_up_proj));
    of_rows.add_rows(grad_joint.bytes(), up(params_.ffn_up_proj).transposed(),
                     grad_normed.bytes());
    BlockProducts::run(of_weight, of_rows);
    norm_backward(rows.hidden, params_.ffn_norm, rows.ffn_stats, n_.model_dim, 1,
                  grad_normed.bytes(), grad_out, grad_hidden, grads.ffn_norm);
  }

  // Writes the gradients of the gates. What comes after the last step gets no gradient: `zeros`.
  void scan_backward(const Rows& rows, const void* grad_hidden, const float* zeros,
                     void* grad_if, void* grad_zo, const ParamGrads& grads) const {
    Buffer grad_outputs(num_bytes(n_.model_dim));
    norm_backward(rows.outputs, params_.out_norm, rows.out_stats, n_.model_dim, n_.num_heads,
                  grad_hidden, nullptr, grad_outputs.bytes(), grads.out_norm);

    const int64_t num_parts = moxe::divide_up(bounds_.num_seqs, bounds_.seqs_of_sum);
    Buffer grad_bias(num_parts * num_biases() * sizeof(float));
    std::vector<float> c(memory_size()), log_n(memory_size()), y(memory_size());
    functions_.scan_backward(shape_, threads(), begins_, lens_, params_.recurrent_weight,
                             rows.outputs, rows.activations, grad_outputs.bytes(), zeros, zeros,
                             zeros, grad_if, grad_zo, grad_bias.floats(), c.data(), log_n.data(),
                             y.data());
    sum_parts(grad_bias.floats(), num_parts, grads.gate_bias);
  }

  // (E,H,num_parts,4*D) to (E,H,4*D)
  void sum_parts(const float* parts, int64_t num_parts, void* to) const {
    const int64_t width = 4 * shape_[4];
    for (int64_t i = 0; i < num_biases(); ++i) {
      const float* part = parts + i / width * num_parts * width + i % width;
      float sum = 0;
      for (int64_t j = 0; j < num_parts; ++j) sum += part[j * width];
      if (is_half())
        static_cast<BFloat16*>(to)[i] = BFloat16(sum);
      else
        static_cast<float*>(to)[i] = sum;
    }
  }

  const Functions& functions_;
  const Bounds& bounds_;
  const int64_t *begins_, *lens_;
  const float empty_;
  const Params& params_;
  const int64_t shape_[5];  // as the scan is told it; the last is D
};

}  // namespace

extern "C" int moxe_slstm_block_forward(const Functions* functions,
                                        const BlockNumbers* numbers, const Bounds* bounds,
                                        const int64_t* counts, const int64_t* run_lens,
                                        const int64_t* begins, const int64_t* lens, double eps,
                                        double empty, const Params* params, const Rows* rows,
                                        void* out) {
  return moxe::lacks_memory([&] {
    Block(*functions, *numbers, *bounds, counts, run_lens, begins, lens, eps, empty, *params)
        .forward(*rows, out);
  });
}

extern "C" int moxe_slstm_block_backward(const Functions* functions,
                                         const BlockNumbers* numbers, const Bounds* bounds,
                                         const int64_t* counts, const int64_t* run_lens,
                                         const int64_t* begins, const int64_t* lens, double eps,
                                         double empty, const Params* params, const Rows* rows,
                                         const ParamGrads* grads, const void* grad_out,
                                         void* grad_flat) {
  return moxe::lacks_memory([&] {
    Block(*functions, *numbers, *bounds, counts, run_lens, begins, lens, eps, empty, *params)
        .backward(*rows, grad_out, grad_flat, *grads);
  });
}

// An mLSTM block on rows: what it does before its cell, and after it; each in one call, as Python
// between its many parts would take longer than some of them. See mlstm_block.py; ../mlstm.py has
// the equations, and ../mlstm_parameters.py the shapes of parameters, here with E first.
//
// Each function returns 0, or 1 if there is no memory. Tensors are of what the block is in, but
// for those of `float`.

#include "block_products.h"

#include <array>
#include <cstdint>

namespace {

using moxe::BlockCalls;
using moxe::BlockFunctions;
using moxe::BlockNumbers;
using moxe::BlockProducts;
using moxe::Buffer;
using moxe::Weights;

// In the order of mlstm_block.py, as all here.
struct Functions {
  BlockFunctions of_blocks;
  void (*output_forward)(const int64_t* shape, const int64_t* counts, double eps, int num_threads,
                         const void* hidden, const void* weight, const void* convolved,
                         const void* skip, const void* gate, void* out, float* stats);
  void (*output_backward)(const int64_t* shape, const int64_t* counts, double eps,
                          int num_threads, const void* hidden, const void* weight,
                          const void* convolved, const void* skip, const void* gate,
                          const float* stats, const void* grad, void* grad_hidden,
                          void* grad_weight, void* grad_convolved, void* grad_skip,
                          void* grad_gate);
  void (*project)(const int64_t* shape, const int64_t* counts, int num_threads,
                  const void* conv_input, const void* convolved, const void* q_weight,
                  const void* k_weight, const void* v_weight, const void* input_gate_weight,
                  const void* forget_gate_weight, const void* input_gate_bias,
                  const void* forget_gate_bias, void* q, void* k, void* v, float* gates);
  void (*project_backward)(const int64_t* shape, const int64_t* counts, int num_threads,
                           const void* conv_input, const void* convolved, const void* q,
                           const void* k, const void* v, const void* q_weight,
                           const void* k_weight, const void* v_weight,
                           const void* input_gate_weight, const void* forget_gate_weight,
                           const void* grad_q, const void* grad_k, const void* grad_v,
                           const float* grad_gates, void* grad_conv_input, void* grad_convolved,
                           void* grad_q_weight, void* grad_k_weight, void* grad_v_weight,
                           void* grad_input_gate_weight, void* grad_forget_gate_weight,
                           void* grad_input_gate_bias, void* grad_forget_gate_bias);
};

struct Params {
  const void *norm, *up_proj, *conv_weight, *conv_bias, *q_proj, *k_proj, *v_proj,
      *input_gate_weight, *forget_gate_weight, *input_gate_bias, *forget_gate_bias, *out_norm,
      *skip, *down_proj;
};

// Some may be null: they are not wanted.
struct ParamGrads {
  void *norm, *up_proj, *conv_weight, *conv_bias, *q_proj, *k_proj, *v_proj, *input_gate_weight,
      *forget_gate_weight, *input_gate_bias, *forget_gate_bias, *out_norm, *skip, *down_proj;
};

// What the cell reads and makes, and what is kept for the way back: (C,M) or (C,I), but
// statistics (C,1,2) and (C,H,2), and gates (C,2H).
struct Rows {
  const void* flat;
  void* normed;
  float* stats;
  void *conv_input, *gate, *convolved, *q, *k, *v;
  float* gates;
  void* hidden;
  void* gated;
  float* out_stats;
};

struct CellGrads {
  const void *q, *k, *v;
  const float* gates;
};

class Block : public BlockCalls {
 public:
  Block(const Functions& functions, const BlockNumbers& numbers, int64_t num_groups,
        const int64_t* counts, const int64_t* run_lens, double eps, const Params& params)
      : BlockCalls(functions.of_blocks, numbers, counts, run_lens, eps),
        functions_(functions),
        num_groups_(num_groups),
        params_(params) {}

  void enter(const Rows& rows) const {
    norm(rows.flat, params_.norm, n_.model_dim, 1, nullptr, rows.normed, rows.stats);

    BlockProducts products(*this, n_.model_dim);
    products.add_rows(rows.normed, up(0), rows.conv_input);
    products.add_rows(rows.normed, up(1), rows.gate);
    products.run();

    convolve(rows.conv_input, n_.inner_dim, params_.conv_weight, params_.conv_bias,
             rows.convolved);
    const auto shape = of_projections();
    functions_.project(shape.data(), counts_, threads(), rows.conv_input, rows.convolved,
                       params_.q_proj, params_.k_proj, params_.v_proj, params_.input_gate_weight,
                       params_.forget_gate_weight, params_.input_gate_bias,
                       params_.forget_gate_bias, rows.q, rows.k, rows.v, rows.gates);
  }

  void leave(const Rows& rows, void* out) const {
    const auto shape = of_output();
    functions_.output_forward(shape.data(), counts_, eps_, threads(), rows.hidden,
                              params_.out_norm, rows.convolved, params_.skip, rows.gate,
                              rows.gated, rows.out_stats);

    copy_rows(rows.flat, out);
    BlockProducts products(*this, n_.inner_dim);
    products.add_rows(rows.gated, down(params_.down_proj), out);
    products.run(true);
  }

  // Writes the gradients of `hidden`, `convolved` and `gate`.
  void leave_backward(const Rows& rows, const void* grad_out, void* grad_hidden,
                      void* grad_convolved, void* grad_gate, const ParamGrads& grads) const {
    Buffer grad_gated(num_bytes(n_.inner_dim));
    BlockProducts of_weight(*this, max_count()), of_rows(*this, n_.model_dim);
    if (grads.down_proj != nullptr)
      of_weight.add_columns(rows.gated, grad_out, down(grads.down_proj));
    of_rows.add_rows(grad_out, down(params_.down_proj).transposed(), grad_gated.bytes());
    BlockProducts::run(of_weight, of_rows);

    const auto shape = of_output();
    functions_.output_backward(shape.data(), counts_, eps_, threads(), rows.hidden,
                               params_.out_norm, rows.convolved, params_.skip, rows.gate,
                               rows.out_stats, grad_gated.bytes(), grad_hidden, grads.out_norm,
                               grad_convolved, grads.skip, grad_gate);
  }

  // Adds to `grad_convolved`.
  void enter_backward(const Rows& rows, const CellGrads& cell, const void* grad_out,
                      void* grad_convolved, const void* grad_gate, void* grad_flat,
                      const ParamGrads& grads) const {
    Buffer grad_conv_input(num_bytes(n_.inner_dim));
    const auto shape = of_projections();
    functions_.project_backward(
        shape.data(), counts_, threads(), rows.conv_input, rows.convolved, rows.q, rows.k,
        rows.v, params_.q_proj, params_.k_proj, params_.v_proj, params_.input_gate_weight,
        params_.forget_gate_weight, cell.q, cell.k, cell.v, cell.gates, grad_conv_input.bytes(),
        grad_convolved, grads.q_proj, grads.k_proj, grads.v_proj, grads.input_gate_weight,
        grads.forget_gate_weight, grads.input_gate_bias, grads.forget_gate_bias);
    convolve_backward(rows.conv_input, n_.inner_dim, params_.conv_weight, params_.conv_bias,
                      grad_convolved, grad_conv_input.bytes(), grads.conv_weight,
                      grads.conv_bias);

    const void* halves[] = {grad_conv_input.bytes(), grad_gate};
    Buffer grad_normed(num_bytes(n_.model_dim));
    BlockProducts of_weight(*this, max_count());
    if (grads.up_proj != nullptr)
      for (int64_t i = 0; i < 2; ++i)
        of_weight.add_columns(rows.normed, halves[i], whole_up(grads.up_proj).half(i, n_.size));
    BlockProducts first(*this, n_.inner_dim), second(*this, n_.inner_dim);
    first.add_rows(halves[0], up(0).transposed(), grad_normed.bytes());
    BlockProducts::run(of_weight, first);
    second.add_rows(halves[1], up(1).transposed(), grad_normed.bytes());
    second.run(true);
    norm_backward(rows.flat, params_.norm, rows.stats, n_.model_dim, 1, grad_normed.bytes(),
                  grad_out, grad_flat, grads.norm);
  }

 private:
  // What functions are told of shapes.
  std::array<int64_t, 4> of_projections() const {
    return {n_.num_experts, num_groups_, 2 * n_.num_heads, n_.inner_dim};
  }
  std::array<int64_t, 4> of_output() const {
    return {n_.num_experts, n_.num_heads, n_.inner_dim / n_.num_heads, n_.inner_dim};
  }

  // (E,1,M,2I), and its half of what is convolved or of the gate.
  Weights whole_up(const void* at) const {
    return Weights::dense(at, n_.num_experts, 1, n_.model_dim, 2 * n_.inner_dim);
  }
  Weights up(int64_t which) const { return whole_up(params_.up_proj).half(which, n_.size); }

  // (E,1,I,M)
  Weights down(const void* at) const {
    return Weights::dense(at, n_.num_experts, 1, n_.inner_dim, n_.model_dim);
  }

  const Functions& functions_;
  const int64_t num_groups_;
  const Params& params_;
};

}  // namespace

// Reads `flat`, and writes the rows from `normed` to `gates`.
extern "C" int moxe_mlstm_enter(const Functions* functions, const BlockNumbers* numbers,
                                const int64_t* num_groups, const int64_t* counts,
                                const int64_t* run_lens, double eps, const Params* params,
                                const Rows* rows) {
  return moxe::lacks_memory([&] {
    Block(*functions, *numbers, *num_groups, counts, run_lens, eps, *params).enter(*rows);
  });
}

// Reads `hidden`, too, and writes `gated`, `out_stats` and `out`.
extern "C" int moxe_mlstm_leave(const Functions* functions, const BlockNumbers* numbers,
                                const int64_t* num_groups, const int64_t* counts,
                                const int64_t* run_lens, double eps, const Params* params,
                                const Rows* rows, void* out) {
  return moxe::lacks_memory([&] {
    Block(*functions, *numbers, *num_groups, counts, run_lens, eps, *params).leave(*rows, out);
  });
}

extern "C" int moxe_mlstm_leave_backward(const Functions* functions,
                                         const BlockNumbers* numbers, const int64_t* num_groups,
                                         const int64_t* counts, const int64_t* run_lens,
                                         double eps, const Params* params, const Rows* rows,
                                         const ParamGrads* grads, const void* grad_out,
                                         void* grad_hidden, void* grad_convolved,
                                         void* grad_gate) {
  return moxe::lacks_memory([&] {
    Block(*functions, *numbers, *num_groups, counts, run_lens, eps, *params)
        .leave_backward(*rows, grad_out, grad_hidden, grad_convolved, grad_gate, *grads);
  });
}

extern "C" int moxe_mlstm_enter_backward(const Functions* functions,
                                         const BlockNumbers* numbers, const int64_t* num_groups,
                                         const int64_t* counts, const int64_t* run_lens,
                                         double eps, const Params* params, const Rows* rows,
                                         const ParamGrads* grads, const void* grad_out,
                                         const void* grad_q, const void* grad_k,
                                         const void* grad_v, const float* grad_gates,
                                         void* grad_convolved, const void* grad_gate,
                                         void* grad_flat) {
  return moxe::lacks_memory([&] {
    Block(*functions, *numbers, *num_groups, counts, run_lens, eps, *params)
        .enter_backward(*rows, {grad_q, grad_k, grad_v, grad_gates}, grad_out, grad_convolved,
                        grad_gate, grad_flat, *grads);
  });
}

// The GRPO loss of tokens from their log-probs, float32 on a CPU: loss, metrics, and the gradients for an upstream of 1, in one
// pass. The definition, with the meaning of every variant, is `policy_loss_ref` in kernels/policy_loss.py.
//
// Tokens are taken 256 at a time, padded with tokens that do not count, so a token's gradient has the same bits wherever it stands.
// Sums are float32 over these and float64 over all. One thread: the logits are a thousand times as many.
#pragma once

#include <cstdint>

namespace thyme {

struct PolicyTokens {
    int64_t tokens, sequences;
    const float *logprob, *entropy, *advantages, *weights;
    const float *old, *ref, *rollout, *tau;  // each may be null
    const uint8_t* segments;                 // 0 text, else code; may be null
    const int64_t* cu_seqlens;               // [sequences + 1]; only for the losses of sequences
};

enum class PolicyLoss : int { kPpo, kGspo, kGspoToken, kCispo };
enum class PolicyKl : int { kK1, kK2, kK3 };
enum class GreedyTokens : int { kRaw, kExclude, kIsPi, kSoft };

struct PolicyConfig {
    PolicyLoss loss;
    PolicyKl kl;
    GreedyTokens greedy;
    bool kl_times_ratio;
    float clip_low, clip_high;  // the ratio is clipped to [clip_low, clip_high]
    float ratio_cap;            // infinite: none
    float kl_coef, entropy_coef;
    float rollout_cap;  // 0: none
};

// Metrics of one group: 8 means, as many more as there are inputs and caps for, the largest ratio, ess, and the count.
int64_t num_policy_metrics(const PolicyTokens& tokens, const PolicyConfig& config);

// metrics [num_policy_metrics, 1 or, with segments, 3 groups: all, text, code]; grads [2, tokens]: d loss / d logprob and entropy.
// Returns the loss.
float policy_loss(const PolicyTokens& tokens, const PolicyConfig& config, float* metrics, float* grads);

}  // namespace thyme

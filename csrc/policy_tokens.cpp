#include "policy_tokens.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "exponential.hpp"
#include "simd.hpp"

namespace thyme {
namespace {

constexpr int64_t kBlock = 256;
constexpr int kMaxMeans = 11;
constexpr float kMaxLogRatio = 20.0f;

// 256 tokens side by side; what a token that does not count holds never gets in.
struct alignas(64) Block {
    float active[kBlock], logprob[kBlock], entropy[kBlock], advantage[kBlock], weight[kBlock], old[kBlock], ref[kBlock],
        mismatch[kBlock], greedy[kBlock], log_ratio[kBlock];
    float token_ratio[kBlock], token_slope[kBlock];  // of the token's own ratio, and its derivative
    float ratio[kBlock], slope[kBlock];              // what the clip sees
    float clip_low[kBlock], clip_high[kBlock], policy[kBlock], policy_slope[kBlock];
    float kl[kBlock], kl_slope[kBlock], mismatch_kl[kBlock], importance[kBlock], capped[kBlock], clamped[kBlock];
    float loss[kBlock], group[kBlock];
};

THYME_INLINE float bounded(float x, float low, float high) { return x < low ? low : x > high ? high : x; }  // NaN stays

THYME_INLINE float clamped_exponential(float x) { return exponential(bounded(x, -kMaxLogRatio, kMaxLogRatio)); }

THYME_INLINE float inside(float x) { return x > kMaxLogRatio || x < -kMaxLogRatio ? 0.0f : 1.0f; }

// x where a token counts, else 0.
THYME_CLONES void take(const float* __restrict x, const float* __restrict active, int64_t count, float* __restrict to) {
    for (int64_t i = 0; i < count; ++i) to[i] = active[i] == 0.0f ? 0.0f : x[i];
    for (int64_t i = count; i < kBlock; ++i) to[i] = 0.0f;
}

THYME_CLONES void load(const PolicyTokens& in, int64_t first, int64_t count, Block& b) {
    for (int64_t i = 0; i < count; ++i) b.active[i] = in.weights[first + i] != 0.0f ? 1.0f : 0.0f;
    for (int64_t i = count; i < kBlock; ++i) b.active[i] = 0.0f;
    take(in.logprob + first, b.active, count, b.logprob);
    take(in.entropy + first, b.active, count, b.entropy);
    take(in.advantages + first, b.active, count, b.advantage);
    take(in.weights + first, b.active, count, b.weight);
    take((in.old == nullptr ? in.logprob : in.old) + first, b.active, count, b.old);
    if (in.ref != nullptr) take(in.ref + first, b.active, count, b.ref);
    if (in.rollout != nullptr) {
        take(in.rollout + first, b.active, count, b.mismatch);
        for (int64_t i = 0; i < kBlock; ++i) b.mismatch[i] = b.old[i] - b.mismatch[i];
    }
    for (int64_t i = 0; i < kBlock; ++i) b.greedy[i] = 0.0f;
    if (in.tau != nullptr)
        for (int64_t i = 0; i < count; ++i) b.greedy[i] = in.tau[first + i] == 0.0f ? b.active[i] : 0.0f;
}

// The token's own ratio; and, for the losses that have no other, what the clip sees.
THYME_CLONES void ratios(Block& b) {
    for (int64_t i = 0; i < kBlock; ++i) {
        const float log_ratio = b.logprob[i] - b.old[i], ratio = clamped_exponential(log_ratio);
        b.log_ratio[i] = log_ratio;
        b.ratio[i] = b.token_ratio[i] = ratio;
        b.slope[i] = b.token_slope[i] = ratio * inside(log_ratio);
    }
}

// What the clip sees where all tokens of a sequence share a log-ratio.
THYME_CLONES void sequence_ratios(const float* log_ratio, int64_t count, Block& b) {
    for (int64_t i = 0; i < kBlock; ++i) b.log_ratio[i] = 0.0f;
    for (int64_t i = 0; i < count; ++i) b.log_ratio[i] = log_ratio[i];
    for (int64_t i = 0; i < kBlock; ++i) {
        b.ratio[i] = clamped_exponential(b.log_ratio[i]);
        b.slope[i] = b.ratio[i] * inside(b.log_ratio[i]);
    }
}

// The policy's term and its derivative by the log-ratio.
THYME_CLONES void policy_terms(const PolicyConfig& config, bool has_rollout, Block& b) {
    const float low = config.clip_low, high = config.clip_high, cap = config.ratio_cap;
    const bool is_cispo = config.loss == PolicyLoss::kCispo;
    for (int64_t i = 0; i < kBlock; ++i) {
        const float ratio = b.ratio[i], a = b.advantage[i], clipped = bounded(ratio, low, high);
        const float at_low = ratio < low && a < 0.0f ? 1.0f : 0.0f, at_high = ratio > high && a > 0.0f ? 1.0f : 0.0f;
        const bool held = at_low + at_high > 0.0f, over = ratio > cap;
        const float taken = held ? clipped : over ? cap : ratio, slope = held || over ? 0.0f : b.slope[i];
        b.clip_low[i] = at_low;
        b.clip_high[i] = at_high;
        b.policy[i] = -a * (is_cispo ? clipped * b.logprob[i] : taken);
        b.policy_slope[i] = -a * (is_cispo ? clipped : slope);
    }
    if (config.greedy == GreedyTokens::kIsPi)
        for (int64_t i = 0; i < kBlock; ++i) {
            const float factor = b.greedy[i] != 0.0f ? exponential(b.logprob[i]) : 1.0f;
            b.policy[i] *= factor;
            b.policy_slope[i] *= factor;
        }
    if (has_rollout && config.rollout_cap > 0.0f)
        for (int64_t i = 0; i < kBlock; ++i) {
            const float correction = exponential(b.mismatch[i] > kMaxLogRatio ? kMaxLogRatio : b.mismatch[i]);
            const float factor = correction > config.rollout_cap ? config.rollout_cap : correction;
            b.policy[i] *= factor;
            b.policy_slope[i] *= factor;
        }
}

THYME_CLONES void kl_terms(PolicyKl kind, Block& b) {
    for (int64_t i = 0; i < kBlock; ++i) {
        const float d = b.ref[i] - b.logprob[i];
        if (kind == PolicyKl::kK1) {
            b.kl[i] = -d;
            b.kl_slope[i] = 1.0f;
        } else if (kind == PolicyKl::kK2) {
            b.kl[i] = 0.5f * d * d;
            b.kl_slope[i] = -d;
        } else {
            const float e = exponential(d > kMaxLogRatio ? kMaxLogRatio : d);
            b.kl[i] = e - d - 1.0f;
            b.kl_slope[i] = 1.0f - (d > kMaxLogRatio ? 0.0f : e);
        }
    }
}

THYME_CLONES void rollout_terms(float log_cap, Block& b) {
    for (int64_t i = 0; i < kBlock; ++i) {
        const float m = b.mismatch[i], e = exponential(m > kMaxLogRatio ? kMaxLogRatio : m);
        b.mismatch_kl[i] = e - m - 1.0f;
        b.importance[i] = b.token_ratio[i] * e;
        b.capped[i] = m > log_cap ? 1.0f : 0.0f;
    }
}

// The loss of each token, and its gradients but for the policy's term of a sequence.
THYME_CLONES void combine(const PolicyConfig& config, bool has_kl, bool shared_ratio, Block& b, float* g, float* h) {
    const float kl_coef = config.kl_coef, entropy_coef = config.entropy_coef;
    const bool excludes = config.greedy == GreedyTokens::kExclude, soft = config.greedy == GreedyTokens::kSoft;
    const bool times_ratio = config.kl_times_ratio;
    for (int64_t i = 0; i < kBlock; ++i) {
        float loss = b.policy[i], slope = shared_ratio ? 0.0f : b.policy_slope[i];
        if (has_kl) {
            loss += kl_coef * (times_ratio ? b.kl[i] * b.token_ratio[i] : b.kl[i]);
            slope += kl_coef * (times_ratio ? b.kl_slope[i] * b.token_ratio[i] + b.kl[i] * b.token_slope[i] : b.kl_slope[i]);
        }
        float bonus = 0.0f;
        if (entropy_coef != 0.0f) {
            loss -= entropy_coef * b.entropy[i];
            bonus = -entropy_coef;
        }
        const bool out = excludes && b.greedy[i] != 0.0f, wrong = soft && b.greedy[i] != 0.0f;
        constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
        loss = out ? 0.0f : wrong ? kNan : loss;
        slope = out ? 0.0f : wrong ? kNan : slope;
        bonus = out ? 0.0f : wrong ? kNan : bonus;
        const float w = b.weight[i];
        b.loss[i] = w == 0.0f ? 0.0f : w * loss;
        g[i] = w == 0.0f ? 0.0f : w * slope;
        h[i] = w == 0.0f ? 0.0f : w * bonus;
    }
}

THYME_CLONES float dot(const float* x, const float* y) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < kBlock; ++i) total += y[i] == 0.0f ? 0.0f : x[i] * y[i];
    return total;
}

THYME_CLONES float squares(const float* x, const float* y) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < kBlock; ++i) total += y[i] == 0.0f ? 0.0f : x[i] * x[i];
    return total;
}

THYME_CLONES float largest(const float* x, const float* y) {
    float most = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < kBlock; ++i) {
        const float value = y[i] == 0.0f ? 0.0f : x[i];
        most = value > most ? value : most;
    }
    return most;
}

struct Sums {
    double means[kMaxMeans] = {}, importance = 0, importance_squares = 0, count = 0;
    float largest = 0;
};

struct Means {
    const float* planes[kMaxMeans];
    int count = 0;
};

Means means_of(const PolicyTokens& in, const PolicyConfig& config, const Block& b, const float* negative_log_ratio) {
    Means out{{b.entropy, b.logprob, b.ratio, b.clip_low, b.clip_high, b.clamped, b.greedy, negative_log_ratio}, 8};
    if (in.ref != nullptr) out.planes[out.count++] = b.kl;
    if (in.rollout != nullptr) out.planes[out.count++] = b.mismatch_kl;
    if (in.rollout != nullptr && config.rollout_cap > 0.0f) out.planes[out.count++] = b.capped;
    return out;
}

void add(const Means& means, const Block& b, const float* members, const float* importance, Sums& sums) {
    for (int k = 0; k < means.count; ++k) sums.means[k] += static_cast<double>(dot(means.planes[k], members));
    sums.importance += static_cast<double>(dot(importance, members));
    sums.importance_squares += static_cast<double>(squares(importance, members));
    sums.count += static_cast<double>(dot(members, members));
    sums.largest = std::max(sums.largest, largest(b.ratio, members));
}

Sums together(const Sums& one, const Sums& other) {
    Sums all = one;
    for (int k = 0; k < kMaxMeans; ++k) all.means[k] += other.means[k];
    all.importance += other.importance, all.importance_squares += other.importance_squares, all.count += other.count;
    all.largest = std::max(all.largest, other.largest);
    return all;
}

// The log-ratios that the clip sees, each token's that of its sequence: the mean over those that count.
std::vector<float> sequence_log_ratios(const PolicyTokens& in, std::vector<int64_t>& counts) {
    std::vector<float> out(static_cast<size_t>(in.tokens));
    counts.assign(static_cast<size_t>(in.sequences), 0);
    for (int64_t s = 0; s < in.sequences; ++s) {
        const int64_t first = in.cu_seqlens[s], last = in.cu_seqlens[s + 1];
        double total = 0;
        int64_t count = 0;
        for (int64_t t = first; t < last; ++t)
            if (in.weights[t] != 0.0f) {
                total += static_cast<double>(in.old == nullptr ? 0.0f : in.logprob[t] - in.old[t]);
                ++count;
            }
        counts[static_cast<size_t>(s)] = count;
        const auto mean = static_cast<float>(total / static_cast<double>(std::max<int64_t>(count, 1)));
        for (int64_t t = first; t < last; ++t) out[static_cast<size_t>(t)] = in.weights[t] != 0.0f ? mean : 0.0f;
    }
    return out;
}

// A token moves the ratio of its whole sequence: adds the sum of these derivatives, over the count, to each of its tokens.
void spread(const PolicyTokens& in, const std::vector<int64_t>& counts, const std::vector<float>& slopes, float* g) {
    for (int64_t s = 0; s < in.sequences; ++s) {
        const int64_t first = in.cu_seqlens[s], last = in.cu_seqlens[s + 1];
        double total = 0;
        for (int64_t t = first; t < last; ++t) total += static_cast<double>(slopes[static_cast<size_t>(t)]);
        const auto share = static_cast<float>(total / static_cast<double>(std::max<int64_t>(counts[static_cast<size_t>(s)], 1)));
        for (int64_t t = first; t < last; ++t)
            if (in.weights[t] != 0.0f) g[t] += share;
    }
}

}  // namespace

int64_t num_policy_metrics(const PolicyTokens& in, const PolicyConfig& config) {
    return 8 + (in.ref != nullptr) + (in.rollout != nullptr) + (in.rollout != nullptr && config.rollout_cap > 0.0f) + 3;
}

float policy_loss(const PolicyTokens& in, const PolicyConfig& config, float* metrics, float* grads) {
    const bool per_sequence = config.loss == PolicyLoss::kGspo || config.loss == PolicyLoss::kGspoToken;
    const bool shared = config.loss == PolicyLoss::kGspo, has_kl = in.ref != nullptr && config.kl_coef != 0.0f;
    std::vector<int64_t> counts;
    const std::vector<float> log_ratios = per_sequence ? sequence_log_ratios(in, counts) : std::vector<float>();
    std::vector<float> slopes(static_cast<size_t>(shared ? in.tokens : 0));
    const float log_cap = config.rollout_cap > 0.0f ? static_cast<float>(std::log(config.rollout_cap)) : 0.0f;
    Block b;
    alignas(64) float negative[kBlock], g[kBlock], h[kBlock], members[kBlock];
    Sums sums[2];
    double loss = 0;
    int num_means = 0;
    for (int64_t first = 0; first < in.tokens; first += kBlock) {
        const int64_t count = std::min(kBlock, in.tokens - first);
        load(in, first, count, b);
        ratios(b);
        for (int64_t i = 0; i < kBlock; ++i) negative[i] = -b.log_ratio[i];
        if (per_sequence) sequence_ratios(log_ratios.data() + first, count, b);
        for (int64_t i = 0; i < kBlock; ++i) b.clamped[i] = 1.0f - inside(b.log_ratio[i]);
        policy_terms(config, in.rollout != nullptr, b);
        if (in.ref != nullptr) kl_terms(config.kl, b);
        if (in.rollout != nullptr) rollout_terms(log_cap, b);
        combine(config, has_kl, shared, b, g, h);
        std::copy(g, g + count, grads + first);
        std::copy(h, h + count, grads + in.tokens + first);
        if (shared)
            for (int64_t i = 0; i < count; ++i) {
                const bool out = config.greedy == GreedyTokens::kExclude && b.greedy[i] != 0.0f;
                slopes[static_cast<size_t>(first + i)] = b.active[i] == 0.0f || out ? 0.0f : b.weight[i] * b.policy_slope[i];
            }
        for (int64_t i = 0; i < kBlock; ++i) members[i] = 1.0f;
        loss += static_cast<double>(dot(b.loss, members));
        const float* const importance = in.rollout == nullptr ? b.token_ratio : b.importance;
        const Means means = means_of(in, config, b, negative);
        num_means = means.count;
        if (in.segments == nullptr) {
            add(means, b, b.active, importance, sums[0]);
            continue;
        }
        for (int segment = 0; segment < 2; ++segment) {
            for (int64_t i = 0; i < kBlock; ++i)
                members[i] = i < count && (in.segments[first + i] != 0) == (segment != 0) ? b.active[i] : 0.0f;
            add(means, b, members, importance, sums[segment]);
        }
    }
    if (shared) spread(in, counts, slopes, grads);
    if (in.tokens == 0) num_means = static_cast<int>(num_policy_metrics(in, config)) - 3;
    const int groups = in.segments == nullptr ? 1 : 3;
    const Sums all = groups == 1 ? sums[0] : together(sums[0], sums[1]);
    for (int group = 0; group < groups; ++group) {
        const Sums& of = group == 0 ? all : sums[group - 1];
        const double count = std::max(of.count, 1.0);
        float* to = metrics + group;
        for (int k = 0; k < num_means; ++k, to += groups) *to = static_cast<float>(of.means[k] / count);
        *to = of.largest, to += groups;
        *to = static_cast<float>(of.importance * of.importance / std::max(of.importance_squares * of.count, 1e-30)), to += groups;
        *to = static_cast<float>(of.count);
    }
    return static_cast<float>(loss);
}

}  // namespace thyme

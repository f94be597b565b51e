#include "decoder_layers.hpp"

#include <memory>
#include <utility>

namespace thyme {

template <typename T>
void run_layers(const DecoderStep<T>& step, int threads) {
    const int64_t rows = step.tokens.tokens, hidden = step.hidden, inner = step.intermediate, dim = 2 * step.tokens.half;
    const int64_t gathered_width = step.tokens.queries * dim, qkv_width = gathered_width + 2 * step.tokens.keys * dim;
    const bool gates = can_gate(2 * inner);
    const auto buffer = [&](int64_t width) { return std::unique_ptr<T[]>(new T[static_cast<size_t>(rows * width)]); };
    const auto normed = buffer(hidden), one = buffer(hidden), other = buffer(hidden), delta = buffer(hidden), qkv = buffer(qkv_width);
    const auto q = buffer(gathered_width), gathered = buffer(gathered_width), active = buffer(inner), both = buffer(gates ? 0 : 2 * inner);
    const T* stream = step.x;
    T *total = one.get(), *spare = other.get();

    const auto multiply = [&](const T* x, int64_t inputs, const Projection<T>& by, int64_t outputs, T* out, bool gated = false) {
        packed_product(Product<T>{x, rows, inputs, outputs, by.weight, by.bias, out, gated}, threads, "best");
    };
    const auto normalize = [&](const Norm<T>& norm, bool adds, T* out) {  // with `adds`, delta goes into the stream first
        const Rows<const T> x{adds ? delta.get() : stream, 1, hidden, 0};
        rmsnorm(x, adds ? stream : nullptr, norm.weight, rows, hidden, norm.eps, out, adds ? total : nullptr, nullptr, threads);
        if (!adds) return;
        stream = total;
        std::swap(total, spare);
    };

    NewTokens<T> tokens = step.tokens;
    tokens.heads = {qkv.get(), tokens.queries + 2 * tokens.keys, qkv_width, dim};
    tokens.q = q.get();
    PagedAttention<T> attention = step.attention;
    attention.q = q.get(), attention.out = gathered.get();
    attention.q_token = attention.out_token = gathered_width, attention.q_head = attention.out_head = dim;
    bool adds = false;
    for (const DecoderLayer<T>& layer : step.layers) {
        normalize(layer.input_norm, adds, normed.get());
        multiply(normed.get(), hidden, layer.qkv, qkv_width, qkv.get());
        tokens.k_cache = layer.k_cache, tokens.v_cache = layer.v_cache;
        turn_and_store(tokens, threads);
        attention.k = layer.k_cache, attention.v = layer.v_cache;
        paged_attention(attention, threads, "best");
        multiply(gathered.get(), gathered_width, layer.out, hidden, delta.get());
        adds = true;
        normalize(layer.mlp_norm, adds, normed.get());
        multiply(normed.get(), hidden, layer.gate_up, 2 * inner, gates ? active.get() : both.get(), gates);
        if (!gates) {
            const Rows<const T> gate{both.get(), 1, 2 * inner, 0}, up{both.get() + inner, 1, 2 * inner, 0};
            swiglu(gate, up, rows, inner, active.get(), threads);
        }
        multiply(active.get(), inner, layer.down, hidden, delta.get());
    }
    normalize(step.last_norm, adds, step.out);
}

template void run_layers(const DecoderStep<float>&, int);
template void run_layers(const DecoderStep<Bfloat16>&, int);

}  // namespace thyme

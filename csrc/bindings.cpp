// Python bindings only: check arguments, release the GIL, translate errors. The algorithms know nothing of Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "decoder_layers.hpp"
#include "packed_product.hpp"
#include "paged_attention.hpp"
#include "pointwise.hpp"
#include "policy_tokens.hpp"
#include "repetition.hpp"
#include "slot_rows.hpp"
#include "softmax_rows.hpp"

namespace py = pybind11;

namespace {

// Borrowed as they are: a conversion here would hide a copy or wrap a wide integer.
using Int32Array = py::array_t<int32_t, py::array::c_style>;
using ByteArray = py::array_t<uint8_t, py::array::c_style>;

// (rule, index, start, period, copies)
using Hit = std::tuple<const char*, uint32_t, uint32_t, uint32_t, uint32_t>;

constexpr const char* kRules[] = {"substring", "tail", "near"};  // by thyme::RepetitionRule

// The detector behind a lock, since push lets other Python threads run.
template <int HashBits>
class LockedDetector {
  public:
    LockedDetector(thyme::RepetitionLimits limits, const ByteArray& classes, uint32_t capacity)
        : detector_(limits, {classes.data(), classes.data() + classes.size()}, capacity) {}

    uint32_t open() {
        const std::lock_guard lock(mutex_);
        return detector_.open();
    }
    uint32_t fork(int64_t slot) {
        const std::lock_guard lock(mutex_);
        return detector_.fork(slot);
    }
    void close(int64_t slot) {
        const std::lock_guard lock(mutex_);
        detector_.close(slot);
    }
    void restart(int64_t slot) {
        const std::lock_guard lock(mutex_);
        detector_.restart(slot);
    }
    std::optional<Hit> hit(int64_t slot) {
        const std::lock_guard lock(mutex_);
        const thyme::RepetitionHit* hit = detector_.hit(slot);
        if (hit == nullptr) return std::nullopt;
        return Hit{kRules[static_cast<size_t>(hit->rule)], hit->index, hit->start, hit->period, hit->copies};
    }
    py::array_t<uint8_t> push(const Int32Array& slots, const Int32Array& tokens) {
        if (slots.ndim() != 1 || tokens.ndim() != 1 || slots.size() != tokens.size())
            throw std::invalid_argument("slots and tokens must be one-dimensional and equally long");
        py::array_t<uint8_t> flags(slots.size());
        const int32_t* slot_data = slots.data();
        const int32_t* token_data = tokens.data();
        uint8_t* flag_data = flags.mutable_data();
        const auto count = static_cast<size_t>(slots.size());
        {
            const py::gil_scoped_release released;
            const std::lock_guard lock(mutex_);
            detector_.push(slot_data, token_data, flag_data, count);
        }
        return flags;
    }

  private:
    std::mutex mutex_;
    thyme::RepetitionDetector<HashBits> detector_;
};

template <int HashBits>
void bind_detector(py::module_& m, const char* name) {
    using Detector = LockedDetector<HashBits>;
    py::class_<Detector>(m, name)
        .def(py::init([](uint32_t window, double ratio, uint32_t min_tokens, uint32_t min_tail_tokens, std::vector<uint32_t> copies,
                         uint32_t structured_copies, uint32_t structured_tokens, double max_data_share, uint32_t min_numbers, uint32_t min_distinct,
                         uint32_t near_tokens, uint32_t near_copies, uint32_t near_exact_copies, uint32_t near_max_period, uint32_t near_edit_cost, uint32_t near_line_cost, double near_row_share, double near_word_share, double near_mark_share,
                         const ByteArray& classes, uint32_t capacity) {
                 return std::make_unique<Detector>(
                     thyme::RepetitionLimits{window, ratio, min_tokens, min_tail_tokens, std::move(copies), structured_copies,
                                             structured_tokens, max_data_share, min_numbers, min_distinct, near_tokens, near_copies, near_exact_copies, near_max_period,
                                             near_edit_cost, near_line_cost, near_row_share, near_word_share, near_mark_share},
                     classes, capacity);
             }),
             py::kw_only(), py::arg("window"), py::arg("ratio"), py::arg("min_tokens"), py::arg("min_tail_tokens"), py::arg("copies"),
             py::arg("structured_copies"), py::arg("structured_tokens"), py::arg("max_data_share"), py::arg("min_numbers"), py::arg("min_distinct"),
             py::arg("near_tokens"), py::arg("near_copies"), py::arg("near_exact_copies"), py::arg("near_max_period"), py::arg("near_edit_cost"), py::arg("near_line_cost"), py::arg("near_row_share"), py::arg("near_word_share"), py::arg("near_mark_share"),
             py::arg("classes").noconvert(), py::arg("capacity"))
        .def("open", &Detector::open)
        .def("fork", &Detector::fork, py::arg("slot"))
        .def("close", &Detector::close, py::arg("slot"))
        .def("restart", &Detector::restart, py::arg("slot"))
        .def("hit", &Detector::hit, py::arg("slot"))
        .def("push", &Detector::push, py::arg("slots").noconvert(), py::arg("tokens").noconvert());
}

using FloatArray = py::array_t<float, 0>;

void check_shape(const char* name, const py::array& array, const std::vector<py::ssize_t>& shape) {
    const auto text = [](const py::ssize_t* sizes, size_t rank) {
        std::string out = "[";
        for (size_t i = 0; i < rank; ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
        return out + "]";
    };
    const auto rank = static_cast<size_t>(array.ndim());
    if (rank != shape.size() || !std::equal(shape.begin(), shape.end(), array.shape()))
        throw std::invalid_argument(std::string(name) + " must have the shape " + text(shape.data(), shape.size()) + ", got " +
                                    text(array.shape(), rank));
}

// Elements per step of each dimension but the last, which must be dense.
std::vector<int64_t> strides(const char* name, const py::array& array) {
    std::vector<int64_t> steps;
    for (py::ssize_t i = 0; i + 1 < array.ndim(); ++i) steps.push_back(array.strides(i) / array.itemsize());
    if (array.shape(array.ndim() - 1) > 1 && array.strides(array.ndim() - 1) != array.itemsize())
        throw std::invalid_argument(std::string("the last dimension of ") + name + " must be dense");
    return steps;
}

void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t vocab_size) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= vocab_size)
            throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(ids[i]) +
                                        ", there are " + std::to_string(vocab_size) + " ids");
}

// numpy has no bfloat16: arrays of it come as the 16-bit integers that hold them.
template <typename T, typename Stored>
void paged_attention(const py::array_t<Stored, 0>& q, const py::array_t<Stored, 0>& k_cache, const py::array_t<Stored, 0>& v_cache,
                     const Int32Array& block_tables, const Int32Array& context_lens, const Int32Array& cu_seqlens_q,
                     double scale, py::array_t<Stored, 0>& out, int num_threads, const std::string& level) {
    static_assert(sizeof(T) == sizeof(Stored));
    const auto data = [](const py::array_t<Stored, 0>& array) { return reinterpret_cast<const T*>(array.data()); };
    if (q.ndim() != 3 || k_cache.ndim() != 4 || block_tables.ndim() != 2)
        throw std::invalid_argument(
            "q must be [tokens, heads, dim], k_cache [blocks, block_size, kv_heads, dim], block_tables [sequences, max_blocks]");
    thyme::PagedAttention<T> args{};
    args.tokens = q.shape(0), args.q_heads = q.shape(1), args.dim = q.shape(2);
    args.blocks = k_cache.shape(0), args.block_size = k_cache.shape(1), args.kv_heads = k_cache.shape(2);
    args.sequences = block_tables.shape(0), args.table_width = block_tables.shape(1);
    if (args.block_size < 1 || args.kv_heads < 1 || args.dim < 1 || args.q_heads < 1 || args.q_heads % args.kv_heads != 0)
        throw std::invalid_argument("the " + std::to_string(args.q_heads) + " heads of q must be a multiple of the " +
                                    std::to_string(args.kv_heads) + " of k_cache, and no size may be 0");
    check_shape("k_cache", k_cache, {args.blocks, args.block_size, args.kv_heads, args.dim});
    check_shape("v_cache", v_cache, {args.blocks, args.block_size, args.kv_heads, args.dim});
    check_shape("context_lens", context_lens, {args.sequences});
    check_shape("cu_seqlens_q", cu_seqlens_q, {args.sequences + 1});
    check_shape("out", out, {args.tokens, args.q_heads, args.dim});
    const auto q_steps = strides("q", q), k_steps = strides("k_cache", k_cache), v_steps = strides("v_cache", v_cache),
               out_steps = strides("out", out);
    args.q = data(q), args.q_token = q_steps[0], args.q_head = q_steps[1];
    args.k = data(k_cache), args.k_block = k_steps[0], args.k_slot = k_steps[1], args.k_head = k_steps[2];
    args.v = data(v_cache), args.v_block = v_steps[0], args.v_slot = v_steps[1], args.v_head = v_steps[2];
    args.block_tables = block_tables.data(), args.table_row = args.table_width;
    args.context_lens = context_lens.data(), args.cu_seqlens_q = cu_seqlens_q.data();
    args.out = reinterpret_cast<T*>(out.mutable_data()), args.out_token = out_steps[0], args.out_head = out_steps[1];
    args.scale = static_cast<float>(scale);
    const py::gil_scoped_release released;
    thyme::check_paged_attention(args);
    thyme::paged_attention(args, num_threads, level);
}

template <typename T, typename Stored>
void bind_attention(py::module_& m, const char* name) {
    m.def(name, &paged_attention<T, Stored>, py::arg("q").noconvert(), py::arg("k_cache").noconvert(),
          py::arg("v_cache").noconvert(), py::arg("block_tables").noconvert(), py::arg("context_lens").noconvert(),
          py::arg("cu_seqlens_q").noconvert(), py::arg("scale"), py::arg("out").noconvert(), py::arg("num_threads"), py::arg("level") = "best");
}

using Int64Array = py::array_t<int64_t, py::array::c_style>;
using BoolArray = py::array_t<bool, py::array::c_style>;
template <typename Stored>
using Dense = py::array_t<Stored, py::array::c_style>;
using DenseFloats = Dense<float>;

thyme::LogitRows logit_rows(const FloatArray& z, const std::optional<DenseFloats>& tau, const std::optional<Int64Array>& banned,
                            const std::optional<BoolArray>& counted) {
    if (z.ndim() != 2) throw std::invalid_argument("z must be [rows, vocab_size]");
    thyme::LogitRows rows{};
    rows.z = z.data(), rows.rows = z.shape(0), rows.vocab_size = z.shape(1), rows.step = strides("z", z)[0];
    if (tau) check_shape("tau", *tau, {rows.rows}), rows.tau = tau->data();
    if (counted) check_shape("counted", *counted, {rows.rows}), rows.counted = reinterpret_cast<const uint8_t*>(counted->data());
    if (banned) {
        rows.banned = banned->data(), rows.num_banned = banned->size();
        check_ids("banned", rows.banned, rows.num_banned, rows.vocab_size);
    }
    return rows;
}

void softmax_rows_f32(const FloatArray& z, const std::optional<DenseFloats>& tau, const std::optional<Int64Array>& banned,
                      const std::optional<BoolArray>& counted, DenseFloats& stats, std::optional<FloatArray>& p, int num_threads) {
    const thyme::LogitRows rows = logit_rows(z, tau, banned, counted);
    check_shape("stats", stats, {4, rows.rows});
    if (p) check_shape("p", *p, {rows.rows, rows.vocab_size});
    float* const out = p ? p->mutable_data() : nullptr;
    const int64_t step = p ? strides("p", *p)[0] : 0;
    float* const to = stats.mutable_data();
    const py::gil_scoped_release released;
    thyme::softmax_rows(rows, to, out, step, num_threads);
}

void draw_rows_f32(const FloatArray& z, const DenseFloats& tau, const std::optional<Int64Array>& banned, const Dense<double>& u,
                   Int64Array& tokens, DenseFloats& drawn, int num_threads) {
    const thyme::LogitRows rows = logit_rows(z, tau, banned, std::nullopt);
    if (rows.vocab_size < 1) throw std::invalid_argument("z has no ids");
    check_shape("u", u, {rows.rows});
    check_shape("tokens", tokens, {rows.rows});
    check_shape("drawn", drawn, {3, rows.rows});
    const double* const by = u.data();
    int64_t* const to = tokens.mutable_data();
    float* const values = drawn.mutable_data();
    const py::gil_scoped_release released;
    thyme::draw_rows(rows, by, to, values, num_threads);
}

void softmax_rows_gradient_f32(const FloatArray& z, const Int64Array& targets, const std::optional<DenseFloats>& tau,
                               const std::optional<Int64Array>& banned, const DenseFloats& stats, const DenseFloats& g,
                               const std::optional<DenseFloats>& h, FloatArray& dz, int num_threads) {
    const thyme::LogitRows rows = logit_rows(z, tau, banned, std::nullopt);
    check_shape("targets", targets, {rows.rows});
    check_ids("targets", targets.data(), rows.rows, rows.vocab_size);
    check_shape("stats", stats, {4, rows.rows});
    check_shape("g", g, {rows.rows});
    if (h) check_shape("h", *h, {rows.rows});
    if (dz.ndim() != 2 || dz.shape(0) != rows.rows || dz.shape(1) < rows.vocab_size)
        throw std::invalid_argument("dz must have the rows of z, and no fewer columns");
    const int64_t step = strides("dz", dz)[0], columns = dz.shape(1);
    float* const out = dz.mutable_data();
    const float* const bonus = h ? h->data() : nullptr;
    const py::gil_scoped_release released;
    thyme::softmax_rows_gradient(rows, targets.data(), stats.data(), g.data(), bonus, out, step, columns, num_threads);
}

py::array_t<float> policy_loss_f32(const DenseFloats& logprob, const DenseFloats& entropy, const DenseFloats& advantages,
                                   const DenseFloats& weights, const std::optional<DenseFloats>& old, const std::optional<DenseFloats>& ref,
                                   const std::optional<DenseFloats>& rollout, const std::optional<DenseFloats>& tau,
                                   const std::optional<ByteArray>& segments, const std::optional<Int64Array>& cu_seqlens, int loss, int kl,
                                   int greedy, bool kl_times_ratio, float clip_low, float clip_high, float ratio_cap, float kl_coef,
                                   float entropy_coef, float rollout_cap, DenseFloats& grads) {
    const py::ssize_t size = logprob.size();
    const auto vector = [&](const char* name, const std::optional<DenseFloats>& array) -> const float* {
        if (!array) return nullptr;
        check_shape(name, *array, {size});
        return array->data();
    };
    thyme::PolicyTokens tokens{};
    tokens.tokens = size;
    tokens.logprob = vector("logprob", logprob), tokens.entropy = vector("entropy", entropy);
    tokens.advantages = vector("advantages", advantages), tokens.weights = vector("weights", weights);
    tokens.old = vector("old", old), tokens.ref = vector("ref", ref), tokens.rollout = vector("rollout", rollout);
    tokens.tau = vector("tau", tau);
    if (segments) check_shape("segments", *segments, {size}), tokens.segments = segments->data();
    if (loss < 0 || loss > 3 || kl < 0 || kl > 2 || greedy < 0 || greedy > 3)
        throw std::invalid_argument("loss, kl and greedy are numbers of GrpoLossConfig's kinds, got " + std::to_string(loss) + ", " +
                                    std::to_string(kl) + ", " + std::to_string(greedy));
    const thyme::PolicyConfig config{static_cast<thyme::PolicyLoss>(loss), static_cast<thyme::PolicyKl>(kl),
                                     static_cast<thyme::GreedyTokens>(greedy), kl_times_ratio, clip_low, clip_high, ratio_cap,
                                     kl_coef, entropy_coef, tokens.rollout == nullptr ? 0.0f : rollout_cap};
    if (config.loss == thyme::PolicyLoss::kGspo || config.loss == thyme::PolicyLoss::kGspoToken) {
        if (!cu_seqlens || cu_seqlens->ndim() != 1 || cu_seqlens->size() < 1)
            throw std::invalid_argument("cu_seqlens must be [sequences + 1] for the losses of sequences");
        const int64_t* const starts = cu_seqlens->data();
        tokens.sequences = cu_seqlens->size() - 1, tokens.cu_seqlens = starts;
        if (starts[0] != 0 || starts[tokens.sequences] != size || !std::is_sorted(starts, starts + tokens.sequences + 1))
            throw std::invalid_argument("cu_seqlens must rise from 0 to " + std::to_string(size));
    }
    check_shape("grads", grads, {2, size});
    const int64_t metrics = thyme::num_policy_metrics(tokens, config) * (segments ? 3 : 1);
    py::array_t<float> out(metrics + 1);
    float *const values = out.mutable_data(), *const to = grads.mutable_data();
    const py::gil_scoped_release released;
    values[metrics] = thyme::policy_loss(tokens, config, values, to);
    return out;
}

// [rows, width], or heads [tokens, heads, width] as they lie in a projection.
template <typename Float, typename Array>
thyme::Rows<Float> rows_of(const char* name, Array& array, Float* data) {
    if (array.ndim() != 2 && array.ndim() != 3)
        throw std::invalid_argument(std::string(name) + " must be [rows, width] or [tokens, heads, width]");
    const std::vector<int64_t> steps = strides(name, array);
    if (array.ndim() == 2) return {data, 1, steps[0], 0};
    return {data, std::max<int64_t>(array.shape(1), 1), steps[0], steps[1]};
}

int64_t num_rows(const py::array& array) { return array.ndim() == 2 ? array.shape(0) : array.shape(0) * array.shape(1); }

template <typename Stored>
const Stored* data_of(const char* name, const std::optional<Dense<Stored>>& array, const std::vector<py::ssize_t>& shape) {
    if (!array) return nullptr;
    check_shape(name, *array, shape);
    return array->data();
}

template <typename Stored>
Stored* data_of(const char* name, std::optional<Dense<Stored>>& array, const std::vector<py::ssize_t>& shape) {
    if (!array) return nullptr;
    check_shape(name, *array, shape);
    return array->mutable_data();
}

// The forward passes: T is what numbers are, Stored what numpy holds them as.
template <typename T, typename Stored>
void rmsnorm(const py::array_t<Stored, 0>& x, const std::optional<Dense<Stored>>& residual, const Dense<Stored>& weight, float eps,
             Dense<Stored>& out, std::optional<Dense<Stored>>& total, std::optional<DenseFloats>& rstd, int num_threads) {
    const auto rows = rows_of("x", x, reinterpret_cast<const T*>(x.data()));
    const int64_t count = num_rows(x), width = x.shape(x.ndim() - 1);
    check_shape("weight", weight, {width});
    check_shape("out", out, {count, width});
    if (residual.has_value() != total.has_value()) throw std::invalid_argument("residual and total go together");
    const auto* const added = reinterpret_cast<const T*>(data_of("residual", residual, {count, width}));
    auto* const sum = reinterpret_cast<T*>(data_of("total", total, {count, width}));
    float* const scale = data_of("rstd", rstd, {count});
    const auto* const by = reinterpret_cast<const T*>(weight.data());
    auto* const to = reinterpret_cast<T*>(out.mutable_data());
    const py::gil_scoped_release released;
    thyme::rmsnorm(rows, added, by, count, width, eps, to, sum, scale, num_threads);
}

void rmsnorm_gradient_f32(const FloatArray& x, const DenseFloats& rstd, const DenseFloats& weight, const DenseFloats& grad,
                          const std::optional<DenseFloats>& grad_total, DenseFloats& grad_x, std::optional<DenseFloats>& grad_weight,
                          int num_threads) {
    const auto rows = rows_of("x", x, x.data());
    const int64_t count = num_rows(x), width = x.shape(x.ndim() - 1);
    check_shape("rstd", rstd, {count});
    check_shape("weight", weight, {width});
    check_shape("grad", grad, {count, width});
    check_shape("grad_x", grad_x, {count, width});
    const float* const more = data_of("grad_total", grad_total, {count, width});
    float *const of_weight = data_of("grad_weight", grad_weight, {width}), *const to = grad_x.mutable_data();
    const float *const scale = rstd.data(), *const by = weight.data(), *const from = grad.data();
    const py::gil_scoped_release released;
    thyme::rmsnorm_gradient(rows, scale, by, from, more, count, width, to, of_weight, num_threads);
}

template <typename T, typename Stored>
void swiglu(const py::array_t<Stored, 0>& gate, const py::array_t<Stored, 0>& up, Dense<Stored>& out, int num_threads) {
    if (gate.ndim() != 2) throw std::invalid_argument("gate must be [rows, width]");
    const int64_t count = gate.shape(0), width = gate.shape(1);
    check_shape("up", up, {count, width});
    check_shape("out", out, {count, width});
    const auto gates = rows_of("gate", gate, reinterpret_cast<const T*>(gate.data()));
    const auto ups = rows_of("up", up, reinterpret_cast<const T*>(up.data()));
    auto* const to = reinterpret_cast<T*>(out.mutable_data());
    const py::gil_scoped_release released;
    thyme::swiglu(gates, ups, count, width, to, num_threads);
}

void swiglu_gradient_f32(const FloatArray& gate, const FloatArray& up, const DenseFloats& grad, FloatArray& grad_gate,
                         FloatArray& grad_up, int num_threads) {
    if (gate.ndim() != 2) throw std::invalid_argument("gate must be [rows, width]");
    const int64_t count = gate.shape(0), width = gate.shape(1);
    check_shape("up", up, {count, width});
    check_shape("grad", grad, {count, width});
    check_shape("grad_gate", grad_gate, {count, width});
    check_shape("grad_up", grad_up, {count, width});
    const auto gates = rows_of("gate", gate, gate.data()), ups = rows_of("up", up, up.data());
    const auto to_gate = rows_of("grad_gate", grad_gate, grad_gate.mutable_data());
    const auto to_up = rows_of("grad_up", grad_up, grad_up.mutable_data());
    const float* const from = grad.data();
    const py::gil_scoped_release released;
    thyme::swiglu_gradient(gates, ups, from, count, width, to_gate, to_up, num_threads);
}

template <typename T, typename Stored>
void turn_heads(const py::array_t<Stored, 0>& heads, const DenseFloats& cos, const DenseFloats& sin, float sign, Dense<Stored>& out,
                int num_threads) {
    if (heads.ndim() != 3 || heads.shape(2) % 2 != 0) throw std::invalid_argument("heads must be [tokens, heads, dim], dim even");
    const int64_t tokens = heads.shape(0), count = heads.shape(1), half = heads.shape(2) / 2;
    check_shape("cos", cos, {tokens, 1, half});
    check_shape("sin", sin, {tokens, 1, half});
    check_shape("out", out, {tokens, count, 2 * half});
    const auto rows = rows_of("heads", heads, reinterpret_cast<const T*>(heads.data()));
    const float *const by_cos = cos.data(), *const by_sin = sin.data();
    auto* const to = reinterpret_cast<T*>(out.mutable_data());
    const py::gil_scoped_release released;
    thyme::turn_heads(rows, by_cos, by_sin, tokens, count, half, sign, to, num_threads);
}

void check_slots(const Int64Array& slots, int64_t places) {
    for (int64_t i = 0; i < slots.size(); ++i)
        if (slots.data()[i] < -1 || slots.data()[i] >= places)
            throw std::invalid_argument("slots[" + std::to_string(i) + "] is " + std::to_string(slots.data()[i]) + ", there are " +
                                        std::to_string(places));
}

template <typename T, typename Stored>
void turn_and_store(const py::array_t<Stored, 0>& qkv, const DenseFloats& cos, const DenseFloats& sin, const Int64Array& slots,
                    Dense<Stored>& k_cache, Dense<Stored>& v_cache, Dense<Stored>& q, int num_threads) {
    if (qkv.ndim() != 3 || qkv.shape(2) % 2 != 0) throw std::invalid_argument("qkv must be [tokens, heads, dim], dim even");
    if (k_cache.ndim() != 4) throw std::invalid_argument("k_cache must be [blocks, block_size, kv_heads, dim]");
    thyme::NewTokens<T> args{};
    args.tokens = qkv.shape(0), args.keys = k_cache.shape(2), args.queries = qkv.shape(1) - 2 * args.keys, args.half = qkv.shape(2) / 2;
    if (args.queries < 1) throw std::invalid_argument("of the " + std::to_string(qkv.shape(1)) + " heads of qkv none is a query's");
    const int64_t blocks = k_cache.shape(0), block_size = k_cache.shape(1), dim = 2 * args.half;
    check_shape("k_cache", k_cache, {blocks, block_size, args.keys, dim});
    check_shape("v_cache", v_cache, {blocks, block_size, args.keys, dim});
    check_shape("cos", cos, {args.tokens, 1, args.half});
    check_shape("sin", sin, {args.tokens, 1, args.half});
    check_shape("slots", slots, {args.tokens});
    check_shape("q", q, {args.tokens, args.queries, dim});
    check_slots(slots, blocks * block_size);
    args.heads = rows_of("qkv", qkv, reinterpret_cast<const T*>(qkv.data()));
    args.cos = cos.data(), args.sin = sin.data(), args.slots = slots.data();
    args.q = reinterpret_cast<T*>(q.mutable_data());
    args.k_cache = reinterpret_cast<T*>(k_cache.mutable_data()), args.v_cache = reinterpret_cast<T*>(v_cache.mutable_data());
    const py::gil_scoped_release released;
    thyme::turn_and_store(args, num_threads);
}

void write_slots(const py::array_t<int16_t, 0>& rows, const Int64Array& slots, py::array_t<int16_t, 0>& table) {
    if (rows.ndim() != 2 || table.ndim() != 2) throw std::invalid_argument("rows and table must be [rows, width]");
    const int64_t count = rows.shape(0), width = rows.shape(1), places = table.shape(0);
    check_shape("slots", slots, {count});
    check_shape("table", table, {places, width});
    const int64_t step = strides("rows", rows)[0];
    if (strides("table", table)[0] != width && places > 1) throw std::invalid_argument("table must be dense");
    check_slots(slots, places);
    constexpr int64_t kSize = sizeof(int16_t);
    const auto* const from = reinterpret_cast<const char*>(rows.data());
    auto* const to = reinterpret_cast<char*>(table.mutable_data());
    const py::gil_scoped_release released;
    thyme::write_slots(from, step * kSize, width * kSize, slots.data(), count, to);
}

template <typename T>
void check_inputs(int64_t inputs) {
    if (static_cast<size_t>(inputs) * sizeof(T) % 4 != 0) throw std::invalid_argument("the inputs of a weight in bfloat16 must be even");
}

template <typename T, typename Stored>
void pack_weight(const Dense<Stored>& weight, Dense<Stored>& packed, int num_threads) {
    if (weight.ndim() != 2) throw std::invalid_argument("weight must be [outputs, inputs]");
    const int64_t outputs = weight.shape(0), inputs = weight.shape(1);
    check_inputs<T>(inputs);
    check_shape("packed", packed, {thyme::packed_size(outputs, inputs)});
    const auto* const from = reinterpret_cast<const T*>(weight.data());
    auto* const to = reinterpret_cast<T*>(packed.mutable_data());
    const py::gil_scoped_release released;
    thyme::pack_weight(from, outputs, inputs, to, num_threads);
}

template <typename T, typename Stored>
void packed_product(const Dense<Stored>& x, const Dense<Stored>& packed, const std::optional<Dense<Stored>>& bias, Dense<Stored>& out,
                    int num_threads, const std::string& level) {
    if (x.ndim() != 2 || out.ndim() != 2) throw std::invalid_argument("x must be [rows, inputs], out [rows, outputs]");
    thyme::Product<T> args{};
    args.rows = x.shape(0), args.inputs = x.shape(1), args.outputs = out.shape(1);
    check_inputs<T>(args.inputs);
    check_shape("packed", packed, {thyme::packed_size(args.outputs, args.inputs)});
    check_shape("out", out, {args.rows, args.outputs});
    args.x = reinterpret_cast<const T*>(x.data()), args.weight = reinterpret_cast<const T*>(packed.data());
    args.bias = reinterpret_cast<const T*>(data_of("bias", bias, {args.outputs}));
    args.out = reinterpret_cast<T*>(out.mutable_data());
    const py::gil_scoped_release released;
    thyme::packed_product(args, num_threads, level);
}

template <typename Stored>
using BoundNorm = std::tuple<Dense<Stored>, float>;
template <typename Stored>
using BoundProjection = std::tuple<Dense<Stored>, std::optional<Dense<Stored>>>;
// input_norm, qkv, out, mlp_norm, gate_up, down, k_cache, v_cache
template <typename Stored>
using BoundLayer = std::tuple<BoundNorm<Stored>, BoundProjection<Stored>, BoundProjection<Stored>, BoundNorm<Stored>,
                              BoundProjection<Stored>, BoundProjection<Stored>, Dense<Stored>, Dense<Stored>>;

template <typename T, typename Stored>
thyme::Norm<T> norm_of(const BoundNorm<Stored>& norm, int64_t hidden) {
    const auto& [weight, eps] = norm;
    check_shape("the weight of a norm", weight, {hidden});
    return {reinterpret_cast<const T*>(weight.data()), eps};
}

template <typename T, typename Stored>
thyme::Projection<T> projection_of(const BoundProjection<Stored>& projection, int64_t outputs, int64_t inputs) {
    const auto& [weight, bias] = projection;
    check_inputs<T>(inputs);
    check_shape("a packed weight", weight, {thyme::packed_size(outputs, inputs)});
    return {reinterpret_cast<const T*>(weight.data()), reinterpret_cast<const T*>(data_of("bias", bias, {outputs}))};
}

template <typename T, typename Stored>
void run_layers(const Dense<Stored>& x, std::vector<BoundLayer<Stored>>& layers, const BoundNorm<Stored>& last_norm, int64_t num_heads,
                int64_t intermediate, const DenseFloats& cos, const DenseFloats& sin, const Int64Array& slots,
                const Int32Array& block_tables, const Int32Array& context_lens, const Int32Array& cu_seqlens_q, float scale,
                Dense<Stored>& out, int num_threads) {
    if (x.ndim() != 2 || block_tables.ndim() != 2 || layers.empty() || std::get<6>(layers[0]).ndim() != 4)
        throw std::invalid_argument(
            "x must be [tokens, hidden], block_tables [sequences, max_blocks], caches [blocks, block_size, kv_heads, dim]");
    const Dense<Stored>& cache = std::get<6>(layers[0]);
    const int64_t rows = x.shape(0), hidden = x.shape(1), keys = cache.shape(2), dim = cache.shape(3);
    if (dim < 2 || dim % 2 != 0 || keys < 1 || num_heads < 1 || num_heads % keys != 0)
        throw std::invalid_argument("the " + std::to_string(num_heads) + " query heads must be a multiple of the " + std::to_string(keys) +
                                    " of the cache, and dim even");
    thyme::DecoderStep<T> step{};
    step.x = reinterpret_cast<const T*>(x.data()), step.hidden = hidden, step.intermediate = intermediate;
    step.last_norm = norm_of<T>(last_norm, hidden);
    for (auto& [input_norm, qkv, to_out, mlp_norm, gate_up, down, k_cache, v_cache] : layers) {
        for (const auto* each : {&k_cache, &v_cache}) check_shape("a cache", *each, {cache.shape(0), cache.shape(1), keys, dim});
        step.layers.push_back({norm_of<T>(input_norm, hidden), projection_of<T>(qkv, (num_heads + 2 * keys) * dim, hidden),
                               projection_of<T>(to_out, hidden, num_heads * dim), norm_of<T>(mlp_norm, hidden),
                               projection_of<T>(gate_up, 2 * intermediate, hidden), projection_of<T>(down, hidden, intermediate),
                               reinterpret_cast<T*>(k_cache.mutable_data()), reinterpret_cast<T*>(v_cache.mutable_data())});
    }
    check_shape("cos", cos, {rows, 1, dim / 2});
    check_shape("sin", sin, {rows, 1, dim / 2});
    check_shape("slots", slots, {rows});
    check_slots(slots, cache.shape(0) * cache.shape(1));
    check_shape("out", out, {rows, hidden});
    auto& tokens = step.tokens;
    tokens.cos = cos.data(), tokens.sin = sin.data(), tokens.slots = slots.data();
    tokens.tokens = rows, tokens.queries = num_heads, tokens.keys = keys, tokens.half = dim / 2;
    auto& attention = step.attention;
    attention.tokens = rows, attention.q_heads = num_heads, attention.kv_heads = keys, attention.dim = dim;
    attention.blocks = cache.shape(0), attention.block_size = cache.shape(1), attention.scale = scale;
    attention.k_head = attention.v_head = dim, attention.k_slot = attention.v_slot = keys * dim;
    attention.k_block = attention.v_block = attention.block_size * keys * dim;
    attention.sequences = block_tables.shape(0), attention.table_width = attention.table_row = block_tables.shape(1);
    check_shape("context_lens", context_lens, {attention.sequences});
    check_shape("cu_seqlens_q", cu_seqlens_q, {attention.sequences + 1});
    attention.block_tables = block_tables.data(), attention.context_lens = context_lens.data();
    attention.cu_seqlens_q = cu_seqlens_q.data();
    step.out = reinterpret_cast<T*>(out.mutable_data());
    const py::gil_scoped_release released;
    thyme::check_paged_attention(attention);
    thyme::run_layers(step, num_threads);
}

template <typename T, typename Stored>
void bind_product(py::module_& m, const std::string& kind) {
    m.def(("run_layers_" + kind).c_str(), &run_layers<T, Stored>, py::arg("x").noconvert(), py::arg("layers").noconvert(),
          py::arg("last_norm").noconvert(), py::arg("num_heads"), py::arg("intermediate"), py::arg("cos").noconvert(),
          py::arg("sin").noconvert(), py::arg("slots").noconvert(), py::arg("block_tables").noconvert(),
          py::arg("context_lens").noconvert(), py::arg("cu_seqlens_q").noconvert(), py::arg("scale"), py::arg("out").noconvert(),
          py::arg("num_threads"));
    m.def(("pack_weight_" + kind).c_str(), &pack_weight<T, Stored>, py::arg("weight").noconvert(), py::arg("packed").noconvert(),
          py::arg("num_threads"));
    m.def(("packed_product_" + kind).c_str(), &packed_product<T, Stored>, py::arg("x").noconvert(), py::arg("packed").noconvert(),
          py::arg("bias").noconvert(), py::arg("out").noconvert(), py::arg("num_threads"), py::arg("level") = "best");
}

template <typename T, typename Stored>
void bind_forward(py::module_& m, const std::string& kind) {
    m.def(("rmsnorm_" + kind).c_str(), &rmsnorm<T, Stored>, py::arg("x").noconvert(), py::arg("residual").noconvert(), py::arg("weight").noconvert(),
          py::arg("eps"), py::arg("out").noconvert(), py::arg("total").noconvert(), py::arg("rstd").noconvert(), py::arg("num_threads"));
    m.def(("swiglu_" + kind).c_str(), &swiglu<T, Stored>, py::arg("gate").noconvert(), py::arg("up").noconvert(), py::arg("out").noconvert(),
          py::arg("num_threads"));
    m.def(("turn_heads_" + kind).c_str(), &turn_heads<T, Stored>, py::arg("heads").noconvert(), py::arg("cos").noconvert(), py::arg("sin").noconvert(),
          py::arg("sign"), py::arg("out").noconvert(), py::arg("num_threads"));
    m.def(("turn_and_store_" + kind).c_str(), &turn_and_store<T, Stored>, py::arg("qkv").noconvert(), py::arg("cos").noconvert(), py::arg("sin").noconvert(),
          py::arg("slots").noconvert(), py::arg("k_cache").noconvert(), py::arg("v_cache").noconvert(), py::arg("q").noconvert(), py::arg("num_threads"));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Thyme's C++ core.";
    bind_detector<61>(m, "RepetitionDetector");
    // Hashes modulo 7: nearly every lookup collides, which proves in tests that the comparison of tokens keeps it exact.
    bind_detector<3>(m, "_CollidingRepetitionDetector");
    bind_attention<float, float>(m, "paged_attention_f32");
    bind_attention<thyme::Bfloat16, int16_t>(m, "paged_attention_bf16");
    m.def("softmax_rows_f32", &softmax_rows_f32, py::arg("z").noconvert(), py::arg("tau").noconvert(),
          py::arg("banned").noconvert(), py::arg("counted").noconvert(), py::arg("stats").noconvert(), py::arg("p").noconvert(),
          py::arg("num_threads"));
    m.def("draw_rows_f32", &draw_rows_f32, py::arg("z").noconvert(), py::arg("tau").noconvert(), py::arg("banned").noconvert(),
          py::arg("u").noconvert(), py::arg("tokens").noconvert(), py::arg("drawn").noconvert(), py::arg("num_threads"));
    m.def("softmax_rows_gradient_f32", &softmax_rows_gradient_f32, py::arg("z").noconvert(), py::arg("targets").noconvert(),
          py::arg("tau").noconvert(), py::arg("banned").noconvert(), py::arg("stats").noconvert(), py::arg("g").noconvert(),
          py::arg("h").noconvert(), py::arg("dz").noconvert(), py::arg("num_threads"));
    m.def("policy_loss_f32", &policy_loss_f32, py::arg("logprob").noconvert(), py::arg("entropy").noconvert(),
          py::arg("advantages").noconvert(), py::arg("weights").noconvert(), py::arg("old").noconvert(), py::arg("ref").noconvert(),
          py::arg("rollout").noconvert(), py::arg("tau").noconvert(), py::arg("segments").noconvert(), py::arg("cu_seqlens").noconvert(),
          py::kw_only(), py::arg("loss"), py::arg("kl"), py::arg("greedy"), py::arg("kl_times_ratio"), py::arg("clip_low"),
          py::arg("clip_high"), py::arg("ratio_cap"), py::arg("kl_coef"), py::arg("entropy_coef"), py::arg("rollout_cap"),
          py::arg("grads").noconvert());
    bind_forward<float, float>(m, "f32");
    bind_forward<thyme::Bfloat16, int16_t>(m, "bf16");
    bind_product<float, float>(m, "f32");
    bind_product<thyme::Bfloat16, int16_t>(m, "bf16");
    m.attr("PACKED_PRODUCT_LEVELS_F32") = py::tuple(py::cast(thyme::product_levels<float>()));
    m.attr("PACKED_PRODUCT_LEVELS_BF16") = py::tuple(py::cast(thyme::product_levels<thyme::Bfloat16>()));
    m.def("rmsnorm_gradient_f32", &rmsnorm_gradient_f32, py::arg("x").noconvert(), py::arg("rstd").noconvert(),
          py::arg("weight").noconvert(), py::arg("grad").noconvert(), py::arg("grad_total").noconvert(), py::arg("grad_x").noconvert(),
          py::arg("grad_weight").noconvert(), py::arg("num_threads"));
    m.def("swiglu_gradient_f32", &swiglu_gradient_f32, py::arg("gate").noconvert(), py::arg("up").noconvert(),
          py::arg("grad").noconvert(), py::arg("grad_gate").noconvert(), py::arg("grad_up").noconvert(), py::arg("num_threads"));
    m.def("write_slots", &write_slots, py::arg("rows").noconvert(), py::arg("slots").noconvert(), py::arg("table").noconvert());
    m.attr("PAGED_ATTENTION_LEVELS") = py::tuple(py::cast(thyme::paged_attention_levels()));
}

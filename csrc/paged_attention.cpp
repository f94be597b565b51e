#include "paged_attention.hpp"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace thyme {
namespace {

constexpr int kChunk = 64;      // keys per step of the softmax
constexpr int kTileRows = 16;   // rows done together, unless the query heads of one key head are more
constexpr int kLargestStep = 32;

// `count` queries of one sequence from token `first` on, at `position` in it, for `heads` key heads from `first_head` on. A row
// is one of these queries with one query head.
struct Tile {
    int64_t sequence, first, count, position, first_head, heads;
};

// Keys, or values, gathered at once: 16 KiB of them stay in a processor's first cache beside the queries; a multiple of four.
int64_t keys_at_once(int64_t heads, int64_t padded) {
    return std::clamp<int64_t>(4096 / (heads * padded) / 4 * 4, 4, kChunk);
}

struct Scratch {
    Scratch(int64_t rows, int64_t heads, int64_t dim) {
        const int64_t padded = (dim + kLargestStep - 1) / kLargestStep * kLargestStep, most = std::max<int64_t>(4096, heads * padded * 4);
        floats.reset(new float[static_cast<size_t>(rows * (kChunk + 2 * padded + 2) + most)]);
        scores = floats.get();
        q = scores + rows * kChunk;
        sums = q + rows * padded;
        largest = sums + rows * padded;
        total = largest + rows;
        gathered = total + rows;
        positions.reset(new int64_t[static_cast<size_t>(2 * rows)]);
        sees = positions.get();
        visible = sees + rows;
    }
    std::unique_ptr<float[]> floats;
    std::unique_ptr<int64_t[]> positions;
    float *scores, *q, *sums, *largest, *total, *gathered;
    int64_t *sees, *visible;  // keys that a row sees, in all and in this chunk
};

template <int count>
struct Rows {
    static constexpr int value = count;
};

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors cross only inlined calls

#define THYME_LEVEL 0
namespace baseline {
#include "attention_tile.inc"
}

// Not target_clones: it splits vectors for the baseline before it makes the clones.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define THYME_HAS_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#undef THYME_LEVEL
#define THYME_LEVEL 3
namespace v3 {
#include "attention_tile.inc"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#undef THYME_LEVEL
#define THYME_LEVEL 4
namespace v4 {
#include "attention_tile.inc"
}
#pragma GCC pop_options
#endif


template <typename T>
using Attend = void (*)(const PagedAttention<T>&, const Tile&, const Tile* after, Scratch&);

struct Level {
    const char* name;
    Attend<float> float32;
    Attend<Bfloat16> bfloat16;

    Attend<float> attend(const PagedAttention<float>&) const { return float32; }
    Attend<Bfloat16> attend(const PagedAttention<Bfloat16>&) const { return bfloat16; }
};

std::vector<Level> find_levels() {
    std::vector<Level> levels{{"baseline", baseline::attend_float32, baseline::attend_bfloat16}};
#ifdef THYME_HAS_X86_LEVELS
    if (__builtin_cpu_supports("x86-64-v3")) levels.push_back({"x86-64-v3", v3::attend_float32, v3::attend_bfloat16});
    if (__builtin_cpu_supports("x86-64-v4")) levels.push_back({"x86-64-v4", v4::attend_float32, v4::attend_bfloat16});
#endif
    return levels;
}

const std::vector<Level>& levels() {
    static const std::vector<Level> found = find_levels();
    return found;
}

}  // namespace

std::vector<std::string> paged_attention_levels() {
    std::vector<std::string> names;
    for (const Level& level : levels()) names.push_back(level.name);
    return names;
}

template <typename T>
void check_paged_attention(const PagedAttention<T>& args) {
    const auto fail = [](const std::string& what) { throw std::invalid_argument(what); };
    const auto of = [](const char* name, int64_t index) { return std::string(name) + "[" + std::to_string(index) + "]"; };
    if (args.cu_seqlens_q[0] != 0 || args.cu_seqlens_q[args.sequences] != args.tokens)
        fail("cu_seqlens_q must run from 0 to the " + std::to_string(args.tokens) + " tokens of q");
    for (int64_t b = 0; b < args.sequences; ++b) {
        const int64_t queries = int64_t{args.cu_seqlens_q[b + 1]} - args.cu_seqlens_q[b];
        if (queries < 0) fail(of("cu_seqlens_q", b + 1) + " is smaller than the entry before it");
        const int64_t context = args.context_lens[b];
        const bool fills_up = context == 0 && queries == 1;  // a row of a batch of fixed size that nobody reads
        if (context < queries && !fills_up)
            fail(of("context_lens", b) + " is " + std::to_string(context) + ", less than its " + std::to_string(queries) +
                 " query tokens");
        if (queries == 0) continue;
        const int64_t pages = (context + args.block_size - 1) / args.block_size;
        if (pages > args.table_width)
            fail(of("context_lens", b) + " is " + std::to_string(context) + ", more than a row of block_tables holds");
        for (int64_t page = 0; page < pages; ++page) {
            const int32_t block = args.block_tables[b * args.table_row + page];
            if (block < 0 || block >= args.blocks)
                fail(of("block_tables", b) + of("", page) + " is " + std::to_string(block) + ", the cache has " +
                     std::to_string(args.blocks) + " blocks");
        }
    }
}

template <typename T>
void paged_attention(const PagedAttention<T>& args, int threads, const std::string& level) {
    Attend<T> attend = levels().back().attend(args);
    if (level != "best") {
        const auto named = [&](const Level& known) { return known.name == level; };
        const auto found = std::find_if(levels().begin(), levels().end(), named);
        if (found == levels().end()) throw std::invalid_argument("this processor does not run the level " + level);
        attend = found->attend(args);
    }
    const int64_t group = args.q_heads / args.kv_heads;
    std::vector<Tile> tiles;
    int64_t work = 0;  // multiply-adds
    for (int64_t b = 0; b < args.sequences; ++b) {
        const int64_t first = args.cu_seqlens_q[b], queries = args.cu_seqlens_q[b + 1] - first;
        const int64_t position = args.context_lens[b] - queries;
        if (queries > 0 && args.context_lens[b] == 0) {
            for (int64_t head = 0; head < args.q_heads; ++head)
                std::fill_n(args.out + first * args.out_token + head * args.out_head, args.dim, T{});
            continue;
        }
        // Queries of a prefill share keys in the cache; a decode takes its key heads together, which lie side by side.
        const int64_t most = std::clamp<int64_t>(kTileRows / group, 1, std::max<int64_t>(queries, 1));
        const int64_t most_heads = std::clamp<int64_t>(kTileRows / (group * most), 1, args.kv_heads);
        for (int64_t i = 0; i < queries; i += most) {
            const int64_t count = std::min(most, queries - i);
            for (int64_t head = 0; head < args.kv_heads; head += most_heads)
                tiles.push_back({b, first + i, count, position + i, head, std::min(most_heads, args.kv_heads - head)});
            work += (position + i + count) * count * args.q_heads * args.dim * 2;
        }
    }
    const int64_t rows = std::max<int64_t>(group, kTileRows);
    constexpr int64_t kWorthAThread = 500'000;  // about 50 us; waking a thread costs a tenth of it
    const auto useful = static_cast<int>(std::clamp<int64_t>(work / kWorthAThread, 1, std::max(threads, 1)));
#pragma omp parallel num_threads(useful) if (useful > 1)
    {
        Scratch scratch(rows, std::min<int64_t>(args.kv_heads, kTileRows), args.dim);
        // A thread takes a few at a time, since it asks for the first keys of one while it is at the last values of the one before.
        const size_t run = std::max<size_t>(tiles.size() / (static_cast<size_t>(useful) * 8), 1);
#pragma omp for schedule(dynamic)
        for (size_t first = 0; first < tiles.size(); first += run) {
            const size_t end = std::min(first + run, tiles.size());
            for (size_t i = first; i < end; ++i) attend(args, tiles[i], i + 1 < end ? &tiles[i + 1] : nullptr, scratch);
        }
    }
}

template void check_paged_attention(const PagedAttention<float>&);
template void check_paged_attention(const PagedAttention<Bfloat16>&);
template void paged_attention(const PagedAttention<float>&, int, const std::string&);
template void paged_attention(const PagedAttention<Bfloat16>&, int, const std::string&);

}  // namespace thyme

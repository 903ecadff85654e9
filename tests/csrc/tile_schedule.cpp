// The index arithmetic of the Hopper kernels, for every small shape and band. Prints what is wrong and
// returns 1.
#include "attention/tile_schedule.hpp"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <tuple>
#include <vector>

using namespace lmkern;

namespace {

// A tile's, in the proportions of the kernels: 64 and 128 up to head_dim 128, 64 and 64 above.
int64_t tile_queries = 4, tile_keys = 8;

[[noreturn]] void fail(const char* what, const AttentionParams& p) {
    std::printf("%s: n_q %lld n_k %lld left %lld right %lld top_left %lld packed %d\n", what,
                static_cast<long long>(p.n_q), static_cast<long long>(p.n_k), static_cast<long long>(p.left),
                static_cast<long long>(p.right), static_cast<long long>(p.top_left),
                p.cu_seqlens_q != nullptr);
    std::exit(1);
}

bool sees(const Band& band, int64_t query, int64_t key) {
    return key >= band.begin(query) && key < band.end(query);
}

// Each tile of queries once, whatever is taken together, and among a group's heads the last blocks first.
void check_query_tiles(const AttentionParams& p) {
    std::set<std::tuple<int64_t, int64_t, int64_t>> expected;
    for (int64_t i = 0; i < p.sequences; ++i)
        for (int64_t head = 0; head < p.heads; ++head)
            for (int64_t block = 0; block * tile_queries < sequence_of(p, i).n_q; ++block)
                expected.insert({i, head, block});
    for (int64_t together = 1; together <= 5; ++together) {
        const TileSchedule schedule(p, tile_queries, together);
        std::set<std::tuple<int64_t, int64_t, int64_t>> found;
        for (int64_t t = 0; t < schedule.tiles; ++t) {
            const QueryTile tile = schedule.at(p, t);
            if (tile.block >= 0 && !found.insert({tile.sequence, tile.head, tile.block}).second)
                fail("a tile of queries comes twice", p);
        }
        if (found != expected) fail("tiles of queries are missing", p);
    }
}

void check_key_tiles(const AttentionParams& p) {
    std::set<std::tuple<int64_t, int64_t, int64_t>> expected, found;
    for (int64_t i = 0; i < p.sequences; ++i)
        for (int64_t head = 0; head < p.heads_kv; ++head)
            for (int64_t block = 0; block * tile_keys < sequence_of(p, i).n_k; ++block)
                expected.insert({i, head, block});
    const KeySchedule schedule(p, tile_keys);
    // dq_sum's blocks, by head: how many tiles of keys have added, in the order of the grid.
    std::map<std::pair<int64_t, int64_t>, int64_t> turns;
    for (int64_t t = 0; t < schedule.tiles; ++t) {
        const KeyTile tile = schedule.at(p, t);
        if (tile.block < 0) continue;
        if (!found.insert({tile.sequence, tile.head_kv, tile.block}).second)
            fail("a tile of keys comes twice", p);
        const Sequence s = sequence_of(p, tile.sequence);
        const Band band(p, s);
        const QueryBlocks queries(band, s.n_q, tile.block * tile_keys, tile_keys, tile_queries);
        for (int64_t block = queries.begin; block < queries.end; ++block) {
            const int64_t index = blocks_before(p, tile.sequence, tile_queries) + block;
            if (index >= blocks_of_head(p, tile_queries)) fail("dq_sum has no room for a block", p);
            const int64_t unit =
                p.cu_seqlens_q != nullptr ? tile.head_kv : tile.sequence * p.heads_kv + tile.head_kv;
            if (turns[{unit, index}]++ != turn_of(band, block * tile_queries, tile.block, tile_keys))
                fail("a tile of keys waits for one that comes later, or never", p);
        }
    }
    if (found != expected) fail("tiles of keys are missing", p);
}

// Every pair that sees each other is in a block that is visited, from both sides; and the tile's own band
// agrees.
void check_bands(const AttentionParams& p) {
    for (int64_t i = 0; i < p.sequences; ++i) {
        const Sequence s = sequence_of(p, i);
        const Band band(p, s);
        for (int64_t first_query = 0; first_query < s.n_q; first_query += tile_queries)
            for (int64_t first_key = 0; first_key < s.n_k; first_key += tile_keys) {
                const int64_t last_query = std::min(first_query + tile_queries, s.n_q) - 1;
                const KeyBlocks keys(band, first_query, last_query, tile_keys);
                const QueryBlocks queries(band, s.n_q, first_key, tile_keys, tile_queries);
                const TileBand here(band, first_query, first_key),
                    later = TileBand(band, 0, first_key).from_query(first_query);
                bool any = false, cut = false;
                for (int64_t q = 0; q < tile_queries; ++q)
                    for (int64_t k = 0; k < tile_keys; ++k) {
                        const bool seen = sees(band, first_query + q, first_key + k);
                        if (here.hides(k, q) == seen || later.hides(k, q) == seen)
                            fail("a tile's band is another", p);
                        any |= seen && first_query + q <= last_query;
                        cut |= !seen;
                    }
                if (cut && !here.cuts(tile_queries, tile_keys))
                    fail("a tile with hidden pairs is taken for whole", p);
                const int64_t key_block = first_key / tile_keys, query_block = first_query / tile_queries;
                if (any && (key_block < keys.begin || key_block >= keys.end))
                    fail("a block of keys is left out", p);
                if (any && (query_block < queries.begin || query_block >= queries.end))
                    fail("a block of queries is left out", p);
            }
    }
}

void check(const AttentionParams& p) {
    check_query_tiles(p);
    check_key_tiles(p);
    check_bands(p);
}

void check_every_band() {
    const int64_t bounds[] = {0, 1, 3, 7, 12, kUnbounded};
    AttentionParams p{};
    p.heads = 4;
    p.heads_kv = 2;
    for (int64_t left : bounds)
        for (int64_t right : bounds)
            for (int64_t top_left : {0, 1}) {
                p.left = left, p.right = right, p.top_left = top_left;
                p.batch = p.sequences = 2;
                p.cu_seqlens_q = p.cu_seqlens_k = nullptr;
                for (p.n_q = 0; p.n_q <= 21; ++p.n_q)
                    for (p.n_k = 0; p.n_k <= 21; ++p.n_k) check(p);
                p.batch = 1;
                const std::vector<std::vector<int32_t>> packed = {
                    {0, 0, 5, 9, 9, 17}, {0, 3, 3, 20, 21, 21}, {0, 4, 8, 16, 16, 24}, {0, 0, 0, 0, 0, 0}};
                for (const auto& queries : packed)
                    for (const auto& keys : packed) {
                        p.cu_seqlens_q = queries.data(), p.cu_seqlens_k = keys.data();
                        p.sequences = 5, p.n_q = queries.back(), p.n_k = keys.back();
                        check(p);
                    }
            }
}

}  // namespace

int main() {
    check_every_band();
    tile_keys = 4;
    check_every_band();
    return 0;
}

// Which tile of queries a block takes next, and which keys it needs: plain arithmetic, the same on the host,
// where it is tested, and on the device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/params.hpp"

namespace lmkern {

struct QueryTile {
    int64_t sequence, head, block;  // block < 0: beyond the last document's tiles, nothing to do
};

// A persistent grid takes the tiles t = blockIdx, blockIdx + gridDim, and so on. Heads are taken `together`,
// as many as have room for their keys and values in the L2 cache, and within such a group the last block of
// queries first, which under a causal mask is the longest.
struct TileSchedule {
    int64_t rows;      // queries of a tile
    int64_t blocks;    // tiles of a head: of one sequence, or an upper bound for all documents
    int64_t units;     // heads of all sequences, or of all documents together
    int64_t together;  // units of a group
    int64_t tiles;

    TileSchedule(const AttentionParams& p, int64_t rows, int64_t together) : rows(rows) {
        const bool packed = p.cu_seqlens_q != nullptr;
        // Each document adds at most one tile that is not full.
        blocks = packed ? p.n_q / rows + p.sequences : (p.n_q + rows - 1) / rows;
        units = packed ? p.heads : p.sequences * p.heads;
        this->together = std::clamp<int64_t>(together, 1, std::max<int64_t>(units, 1));
        tiles = blocks * units;
    }

    constexpr QueryTile at(const AttentionParams& p, int64_t tile) const {
        const int64_t group = tile / (together * blocks), rest = tile - group * together * blocks;
        const int64_t left = units - group * together, size = left < together ? left : together;
        const int64_t unit = group * together + rest % size, block = blocks - 1 - rest / size;
        if (p.cu_seqlens_q == nullptr) return {unit / p.heads, unit % p.heads, block};
        int64_t first = 0;
        for (int64_t sequence = 0; sequence < p.sequences; ++sequence) {
            const int64_t own = (p.cu_seqlens_q[sequence + 1] - p.cu_seqlens_q[sequence] + rows - 1) / rows;
            if (block < first + own) return {sequence, unit, block - first};
            first += own;
        }
        return {0, unit, -1};
    }
};

// Blocks of keys that some query of a tile sees: begin to end, none where begin == end.
struct KeyBlocks {
    int64_t begin, end;

    constexpr KeyBlocks(const Band& band, int64_t first_query, int64_t last_query, int64_t keys)
        : begin(0), end(0) {
        const int64_t first = band.begin(first_query), last = band.end(last_query);
        if (last <= first) return;
        begin = first / keys;
        end = (last + keys - 1) / keys;
    }
};

// The band counted from a query and a key near those it is asked about, in 32 bits.
struct TileBand {
    int before, after, keys;

    constexpr TileBand(const Band& band, int64_t first_query, int64_t first_key)
        : before(near(band.before + first_query - first_key)),
          after(near(band.after + first_query - first_key)),
          keys(near(band.n_k - first_key)) {}

    // Counted from a later query.
    constexpr TileBand from_query(int later) const {
        TileBand band = *this;
        band.before += later;
        band.after += later;
        return band;
    }

    constexpr bool hides(int key, int query) const {
        return key - query < before || key - query >= after || key >= keys;
    }

    // Whether a tile of so many queries and keys has a pair that is hidden.
    constexpr bool cuts(int queries, int tile_keys) const {
        return 1 - queries < before || tile_keys - 1 >= after || tile_keys > keys;
    }

private:
    // Further than any tile, more or less is the same; with a length, 2^30 at most, it still fits.
    static constexpr int near(int64_t distance) {
        return static_cast<int>(distance < -kFar ? -kFar : distance > kFar ? kFar : distance);
    }
    static constexpr int64_t kFar = int64_t{1} << 30;
};

// The backward's grid has a block for each tile of keys and key/value head, in the order of the head, the
// sequence and the tile.
struct KeyTile {
    int64_t sequence, head_kv, block;  // block < 0: beyond the last document's tiles
};

struct KeySchedule {
    int64_t rows;    // keys of a tile
    int64_t blocks;  // tiles of a head, an upper bound for documents
    int64_t tiles;

    KeySchedule(const AttentionParams& p, int64_t rows) : rows(rows) {
        const bool packed = p.cu_seqlens_k != nullptr;
        blocks = packed ? p.n_k / rows + p.sequences : (p.n_k + rows - 1) / rows;
        tiles = blocks * p.heads_kv * (packed ? 1 : p.sequences);
    }

    constexpr KeyTile at(const AttentionParams& p, int64_t tile) const {
        const int64_t unit = tile / blocks, block = tile % blocks;
        if (p.cu_seqlens_k == nullptr) return {unit / p.heads_kv, unit % p.heads_kv, block};
        int64_t first = 0;
        for (int64_t sequence = 0; sequence < p.sequences; ++sequence) {
            const int64_t own = (p.cu_seqlens_k[sequence + 1] - p.cu_seqlens_k[sequence] + rows - 1) / rows;
            if (block < first + own) return {sequence, unit, block - first};
            first += own;
        }
        return {0, unit, -1};
    }
};

// Blocks of queries that see some key of a tile: begin to end, none where begin >= end.
struct QueryBlocks {
    int64_t begin, end;

    constexpr QueryBlocks(const Band& band, int64_t n_q, int64_t first_key, int64_t keys, int64_t queries)
        : begin(0), end(0) {
        const int64_t last_key = std::min(first_key + keys, band.n_k) - 1;
        const int64_t first = std::max<int64_t>(band.first_query(first_key), 0);
        const int64_t last = std::min(band.end_query(last_key), n_q);
        if (last <= first) return;
        begin = first / queries;
        end = (last + queries - 1) / queries;
    }
};

// The tiles of keys that see a block of queries add to its dq one after the other, in their order: how many
// come before this one.
constexpr int64_t turn_of(const Band& band, int64_t first_query, int64_t key_block, int64_t keys) {
    return key_block - band.begin(first_query) / keys;
}

// The blocks of queries that dq_sum has before those of a sequence.
constexpr int64_t blocks_before(const AttentionParams& p, int64_t sequence, int64_t queries) {
    if (p.cu_seqlens_q == nullptr) return 0;
    int64_t blocks = 0;
    for (int64_t i = 0; i < sequence; ++i)
        blocks += (p.cu_seqlens_q[i + 1] - p.cu_seqlens_q[i] + queries - 1) / queries;
    return blocks;
}

// Of one head in dq_sum, an upper bound for documents.
constexpr int64_t blocks_of_head(const AttentionParams& p, int64_t queries) {
    return p.cu_seqlens_q != nullptr ? p.n_q / queries + p.sequences : (p.n_q + queries - 1) / queries;
}

}  // namespace lmkern

// Attention of few queries over a long cache of keys and values. Contract:
// lmkern/kernels/cached_attention/__init__.py.
#pragma once

#include "cached_attention/params.hpp"

namespace lmkern {

// Reads q and of k and v the keys in use; writes out and lse. lengths lie in [0, n_max] and the pages in use
// exist.
void cached_attention_forward(const CachedAttentionParams& p);

}  // namespace lmkern

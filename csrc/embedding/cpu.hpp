// Embedding on the CPU. Contract: lmkern/kernels/embedding/__init__.py.
#pragma once

#include "embedding/params.hpp"

namespace lmkern {

// Reads tokens, weight; writes y.
void embedding_forward(const EmbeddingParams& p);

// Reads tokens, dy; writes dweight, and the scratch.
void embedding_backward(const EmbeddingParams& p);

}  // namespace lmkern

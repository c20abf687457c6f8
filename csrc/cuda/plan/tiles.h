// The model of a tiled kernel, which the steps of a sequence share with the cell's forward.
#pragma once
#include <string>

#include "cuda/plan/cell_forward.h"

namespace rnn_ext::cuda {

// What it takes by the model: a launch of its own.
double tiled_microseconds(const ForwardTiledKernel& k, const ForwardCase& c, const Device& d, int splits,
                          Reduction reduction);

// Why it can't take the case; empty if it can.
std::string why_not_tiled(const ForwardTiledKernel& k, const ForwardCase& c, const Device& d);

}  // namespace rnn_ext::cuda

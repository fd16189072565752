// Which instruction set's kernels run here: the best that the CPU has, or the one that FASTSERVE_ISA names.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernel.h"

namespace fastserve {

// Names of the compiled instruction sets that this CPU can run, best first.
std::vector<std::string> runnable_isas();

// The named instruction set, or the best one where the name is empty.
// Throws std::invalid_argument where the name is unknown or the CPU lacks it.
const Kernels& choose_kernels(const std::string& isa);

}  // namespace fastserve

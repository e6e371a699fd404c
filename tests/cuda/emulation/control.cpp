// How the next launches of the emulation run, if they do.
#include "emulated_primitives.h"

// `seed` decides the order of warps and blocks; copies happen when they are issued (`early_copies`)
// or when they are waited for.
extern "C" void recalkv_emulate(uint32_t seed, int early_copies) {
  auto& machine = recalkv::emulation::Machine::get();
  machine.seed = seed;
  machine.early_copies = early_copies != 0;
}

// `observer` is told of the next launches, which then do not run; null has them run again.
extern "C" void recalkv_observe(recalkv::emulation::Machine::Observer observer) {
  recalkv::emulation::Machine::get().observer = observer;
}

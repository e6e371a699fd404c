// Everything below a kernel is compiled into it.
#pragma once

#define RECALKV_INLINE inline __attribute__((always_inline))

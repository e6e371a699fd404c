// All that a file of kernels_*.cpp instantiates.
#pragma once

#include "attend.h"
#include "dequantize.h"
#include "expansion.h"
#include "gather.h"
#include "reconstruct.h"
#include "rows.h"
#include "value_up_tile.h"

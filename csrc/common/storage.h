// How a tensor's elements are stored, as kernel tables are told.
#pragma once

namespace seqmem {

enum class Storage { Float, Double, BFloat16, Half };

}  // namespace seqmem

// Pages that many processes read and few write, taken out of what a fork copies.
#pragma once

#include <cstddef>

namespace thyme {

struct Range {
    std::size_t start, size, protection;  // bytes, multiples of the page; PROT_*
};

// Has private mappings of a sealed memory file, with the same content, take the place of `ranges`, and returns how many
// bytes they are; 0 where there is no memory for it, and nothing is changed.
//
// Anonymous pages are entered one by one in every fork and taken down one by one at its end. Those of a file are left
// out of the copy; whoever needs one finds it, with its neighbours, at the first touch. Writes stay private as before:
// the file cannot be written to, by anybody, from here on. The process must have one thread.
std::size_t share_pages(const Range* ranges, std::size_t count);

}  // namespace thyme

// The OpenMP runtime: what threads.cpp needs of it, and which copy of it this process uses.
//
// A process may hold several copies of a runtime, one for each package that brought its own. Each
// has its own pool of threads, and two pools that work by turns are slower than one: the threads of
// the one that rests still spin. So on Linux nothing here is linked to a runtime. Its functions are
// looked up when the first of them is needed, in the first of these that there is:
//
//   1. a runtime that the process has loaded already, for example torch's
//   2. the one that an installed package would load later (set_openmp_candidates())
//   3. the system's libgomp.so.1
//   4. the copy that a wheel brings along (libfastrnn_openmp.so.1, beside this library)
//
// Elsewhere the compiler's own OpenMP is linked, where it has one.
#pragma once

#include <string>
#include <vector>

namespace fastrnn {

// Files to look for in step 2, the best first; of two loaded runtimes, too, an earlier one is
// taken. Call it before the first parallel region; later calls change nothing.
void set_openmp_candidates(std::vector<std::string> files);

// The file of the runtime in use, which this call chooses if need be; "linked" where it is the
// compiler's; empty without a runtime: every region then has one thread.
std::string openmp_file();

namespace openmp {

// Runs body(argument) on `threads` threads, or fewer where the runtime has a limit.
void parallel(int threads, void (*body)(void*), void* argument);
// Inside body: the threads that run it, and which of them this is.
int team_size();
int thread_number();
// Whether this thread is inside a parallel region.
bool in_parallel();
// The threads of a region that asks for no number: OMP_NUM_THREADS or the cores.
int max_threads();
// Before a fork: ends the threads that wait for this thread's next region. Returns whether none are
// left. Chooses no runtime: what is not loaded has no threads.
bool release_pool();

}  // namespace openmp
}  // namespace fastrnn

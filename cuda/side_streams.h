// Streams beside the caller's, for work of one call that may run at the same time: the layers of a
// stack, each on a stream of its own (stack.h).
//
// Order       a side stream begins where the caller's stands when it is made, and the caller's goes
//             on after all of them: whoever looks at the caller's stream alone sees one piece of
//             work. So memory that torch frees is not used any more, and a graph that captures the
//             caller's stream has the side streams in it.
// Deadlock    none of the work on them may wait for other work but by `wait`, which looks back at
//             what has been issued before. Persistent kernels, whose blocks wait for each other,
//             must not run here: two of them could each hold multiprocessors that the other needs.
//
// Two definitions: side_streams.cu on a GPU, and cuda/tests/host_streams.cpp on a CPU.
#pragma once

#include <memory>

namespace fastrnn::cuda {

// Of the current device; 0: there is none.
int multiprocessors();

class SideStreams {
 public:
  // Throws std::runtime_error where CUDA fails, as wait() and join() do.
  SideStreams(void* caller, int count);
  ~SideStreams();  // joins, if nobody has
  SideStreams(const SideStreams&) = delete;
  SideStreams& operator=(const SideStreams&) = delete;

  void* stream(int k) const;  // a cudaStream_t
  // What is issued on stream k from now on runs after all that stream `before` has been given.
  void wait(int k, int before);
  // What is issued on the caller's stream from now on runs after all of theirs.
  void join();

 private:
  struct Streams;
  std::unique_ptr<Streams> streams_;
};

}  // namespace fastrnn::cuda

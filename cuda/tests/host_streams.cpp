// Side streams on the CPU: queues whose work runs when they are joined, in an order that the waits
// allow and the emulator's order chooses: the first stream as far as it can go, the last one as far
// as it can go, or one after the other at random. So a wait that is missing shows, as what a layer
// reads has not been written, or has been written over.
//
// Where there is a library its products run at once, and so does everything else.
#include <random>
#include <stdexcept>
#include <vector>

#include "emulator.h"
#include "library.h"
#include "side_streams.h"

namespace fastrnn::cuda {

int multiprocessors() { return emulator().multiprocessors; }

struct SideStreams::Streams {
  std::vector<Queue> queues;
  bool at_once;
  std::mt19937 random{7};

  bool ready(const Queue& queue) const {
    if (queue.done == queue.tasks.size()) return false;
    const Task& task = queue.tasks[queue.done];
    return task.after < 0 || queues[static_cast<std::size_t>(task.after)].done >= task.count;
  }

  Queue* next() {
    std::vector<Queue*> able;
    for (Queue& queue : queues)
      if (ready(queue)) able.push_back(&queue);
    if (able.empty()) return nullptr;
    if (emulator().order == Order::forwards) return able.front();
    if (emulator().order == Order::backwards) return able.back();
    return able[random() % able.size()];
  }
};

SideStreams::SideStreams(void*, int count) : streams_(new Streams) {
  streams_->queues.resize(static_cast<std::size_t>(count));
  streams_->at_once = find_library() != nullptr;
}

SideStreams::~SideStreams() {}

void* SideStreams::stream(int k) const {
  return streams_->at_once ? nullptr : &streams_->queues[static_cast<std::size_t>(k)];
}

void SideStreams::wait(int k, int before) {
  std::vector<Queue>& queues = streams_->queues;
  queues[static_cast<std::size_t>(k)].tasks.push_back(
      {[] {}, before, queues[static_cast<std::size_t>(before)].tasks.size()});
}

void SideStreams::join() {
  ++emulator().joins;
  while (Queue* const queue = streams_->next()) queue->tasks[queue->done++].run();
  for (const Queue& queue : streams_->queues)
    if (queue.done != queue.tasks.size())
      throw std::runtime_error("the side streams wait for each other");
}

}  // namespace fastrnn::cuda

// Runs a package of torch's AOTInductor without Python: its arguments are the package and a number
// of rows; it prints the values of the output, one a line. examples/inductor.py compiles and runs
// it.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdlib>
#include <iostream>

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "usage: " << arguments[0] << " PACKAGE ROWS\n";
    return 2;
  }
  const int64_t rows = std::atol(arguments[2]);
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const torch::Tensor x = torch::arange(20 * rows * 8).sin().reshape({20, rows, 8});
  const torch::Tensor tags = model.run({x})[0].flatten();
  std::cout.precision(9);
  for (int64_t i = 0; i < tags.numel(); ++i) std::cout << tags[i].item<float>() << "\n";
}

#include "ptx.h"

#include <cctype>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace fastrnn::virtual_device {
namespace {

bool is_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || std::strchr("_$%.", c);
}

// A function's body, statement by statement.
class Body {
 public:
  Body(std::string_view text, std::size_t at, int line,
       const std::map<std::string, std::int64_t>& known, Function* to)
      : text_(text), at_(at), line_(line), symbols_(known), function_(*to) {}

  // Reads from after the opening brace to after the closing brace; returns that position.
  std::size_t read() {
    int depth = 1;
    while (depth > 0) {
      skip();
      const char c = peek();
      if (c == '{') {
        ++at_, ++depth;
        scopes_.emplace_back();
      } else if (c == '}') {
        ++at_, --depth;
        if (depth > 0) scopes_.pop_back();
      } else {
        statement();
      }
    }
    for (Instruction& in : function_.code)
      if (in.kind == Kind::branch) in.target = labels_.at(jumps_.at(&in - function_.code.data()));
    function_.slots = slots_;
    return at_;
  }
  int line() const { return line_; }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(function_.name + ", PTX line " + std::to_string(line_) + ": " + what);
  }

  char peek() const {
    if (at_ >= text_.size()) fail("it ends early");
    return text_[at_];
  }
  void skip() {
    for (;;) {
      while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) {
        if (text_[at_] == '\n') ++line_;
        ++at_;
      }
      if (text_.compare(at_, 2, "//") == 0)
        at_ = text_.find('\n', at_);
      else
        return;
    }
  }
  std::string name() {
    const std::size_t from = at_;
    while (at_ < text_.size() && is_name(text_[at_])) ++at_;
    return std::string(text_.substr(from, at_ - from));
  }
  std::string rest_of_statement() {
    const std::size_t to = text_.find(';', at_);
    const std::string found(text_.substr(at_, to - at_));
    for (const char c : found) line_ += c == '\n';
    at_ = to + 1;
    return found;
  }

  // ---- slots ------------------------------------------------------------------------------------

  int fresh(int count = 1) {
    const int first = slots_;
    slots_ += count;
    return first;
  }
  int constant(std::uint64_t value, Special special = Special::none) {
    const auto [found, is_new] = constants_.try_emplace({special, value}, slots_);
    if (is_new) function_.constants.push_back({fresh(), special, value});
    return found->second;
  }

  // ".reg .b32 %r<2742>;", ".reg .pred complete;"
  void declare_registers() {
    const std::string what = rest_of_statement();
    const std::size_t from =
        what.find_first_not_of(" \t", what.find_first_of(" \t", what.find('.')));
    const std::size_t many = what.find('<');
    if (many == std::string::npos) {
      scopes_.back()[what.substr(from)] = fresh();
      return;
    }
    const std::string prefix = what.substr(from, many - from);
    const int count = std::atoi(what.c_str() + many + 1);
    const int first = fresh(count);
    for (int i = 0; i < count; ++i) scopes_.back()[prefix + std::to_string(i)] = first + i;
  }

  // ".shared .align 8 .b8 name[8448];"
  void declare_shared() {
    const std::string what = rest_of_statement();
    const std::size_t alignment = std::strtoul(what.c_str() + what.find(".align") + 6, nullptr, 10);
    const std::size_t bracket = what.find('['), from = what.rfind(' ', bracket) + 1;
    function_.shared_bytes = (function_.shared_bytes + alignment - 1) / alignment * alignment;
    symbols_[what.substr(from, bracket - from)] = static_cast<std::int64_t>(function_.shared_bytes);
    function_.shared_bytes += std::strtoul(what.c_str() + bracket + 1, nullptr, 10);
  }

  int operand(const std::string& text) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (const auto found = scope->find(text); found != scope->end()) return found->second;
    static const std::map<std::string, Special> specials{{"%tid.x", Special::thread},
                                                         {"%ctaid.x", Special::block}};
    if (const auto found = specials.find(text); found != specials.end())
      return constant(0, found->second);
    if (const auto found = symbols_.find(text); found != symbols_.end())
      return constant(static_cast<std::uint64_t>(found->second));
    if (text == "_") return constant(0);
    if (text.size() == 10 && (text[1] == 'f' || text[1] == 'F'))
      return constant(std::strtoull(text.c_str() + 2, nullptr, 16));
    if (text.size() == 18 && (text[1] == 'd' || text[1] == 'D'))
      return constant(std::strtoull(text.c_str() + 2, nullptr, 16));
    char* end = nullptr;
    const std::uint64_t number =
        text[0] == '-' ? static_cast<std::uint64_t>(std::strtoll(text.c_str(), &end, 0))
                       : std::strtoull(text.c_str(), &end, 0);
    if (end == text.c_str() || (*end && *end != 'U')) fail("the operand '" + text + "' is unknown");
    return constant(number);
  }

  // "[name+8]": its base, and the offset into the instruction.
  int address(const std::string& text, Instruction* in) {
    const std::size_t sign = text.find_first_of("+-", 1);
    if (sign != std::string::npos) {
      if (in->offset) fail("two addresses with an offset");
      in->offset = std::strtoll(text.c_str() + sign + (text[sign] == '+'), nullptr, 10);
    }
    return operand(text.substr(0, sign));
  }

  // ---- statements -------------------------------------------------------------------------------

  void statement() {
    Instruction in;
    in.line = line_;
    if (peek() == '@') {
      ++at_;
      in.unless = peek() == '!';
      at_ += in.unless;
      in.guard = operand(name());
      skip();
    }
    std::string opcode = name();
    while (text_.compare(at_, 2, "::") == 0) {  // st.async.shared::cluster
      at_ += 2;
      opcode += "::" + name();
    }
    if (peek() == ':') {
      ++at_;
      labels_[opcode] = static_cast<int>(function_.code.size());
      return;
    }
    if (opcode == ".reg") return declare_registers();
    if (opcode == ".shared") return declare_shared();
    if (opcode == ".pragma") return void(rest_of_statement());
    if (opcode.empty()) fail("a statement is unknown");
    if (opcode[0] == '.') fail(opcode + " is unknown");
    operands(rest_of_statement(), opcode, &in);
    try {
      decode(opcode, &in);
    } catch (const std::runtime_error& error) {
      fail(error.what());
    }
    function_.code.push_back(std::move(in));
  }

  void operands(const std::string& text, const std::string& opcode, Instruction* in) {
    const bool jumps = opcode.compare(0, 3, "bra") == 0;
    std::size_t at = text.find_first_not_of(" \t\n");
    in->apart = at < text.size() && text[at] == '{';
    while (at < text.size()) {
      if (std::strchr(" \t\n,{}|]", text[at])) {
        ++at;
        continue;
      }
      const bool in_memory = text[at] == '[';
      at += in_memory;
      const std::size_t from = at;
      while (at < text.size() && !std::strchr(" \t\n,{}|]", text[at])) ++at;
      const std::string one = text.substr(from, at - from);
      if (jumps)
        jumps_[static_cast<std::ptrdiff_t>(function_.code.size())] = one;
      else
        in->slots.push_back(in_memory ? address(one, in) : operand(one));
    }
  }

  std::string_view text_;
  std::size_t at_;
  int line_;
  std::map<std::string, std::int64_t> symbols_;  // parameters and shared arrays, by their offset
  Function& function_;
  std::vector<std::map<std::string, int>> scopes_{1};
  std::map<std::pair<Special, std::uint64_t>, int> constants_;
  std::map<std::string, int> labels_;
  std::map<std::ptrdiff_t, std::string> jumps_;
  int slots_ = 0;
};

}  // namespace

Module::Module(std::string_view text) {
  // Only entries: nvcc inlines everything else. Kernels have in common only the dynamic shared
  // array, which begins after a kernel's own shared arrays.
  std::string dynamic;
  if (const std::size_t at = text.find(".extern .shared"); at != std::string_view::npos) {
    const std::size_t bracket = text.find('[', at), from = text.rfind(' ', bracket) + 1;
    dynamic = text.substr(from, bracket - from);
  }
  std::size_t at = 0, counted = 0;
  int line = 1;
  while ((at = text.find(".entry ", at)) != std::string_view::npos) {
    Function function;
    const std::size_t open = text.find('(', at), close = text.find("\n)", open),
                      body = text.find("\n{", close);
    function.name = text.substr(at + 7, open - at - 7);
    // ".param .align 8 .b8 name[392]", ".param .u64 name"
    std::map<std::string, std::int64_t> known;
    std::size_t from = open;
    while ((from = text.find(".param", from)) < close) {
      std::size_t to = text.find_first_of(",\n", from);
      const std::string what(text.substr(from, to - from));
      const std::size_t bracket = what.find('['), name = what.rfind(' ', bracket) + 1;
      if (bracket == std::string::npos || !known.empty())
        throw std::runtime_error(function.name + ": only one structure is known as parameter");
      known[what.substr(name, bracket - name)] = 0;
      function.parameter_bytes = std::strtoul(what.c_str() + bracket + 1, nullptr, 10);
      from = to;
    }
    if (!dynamic.empty()) known[dynamic] = 0;
    for (; counted < body + 2; ++counted) line += text[counted] == '\n';
    Body reader(text, body + 2, line, known, &function);
    at = counted = reader.read();
    line = reader.line();
    if (!dynamic.empty() && function.shared_bytes)
      throw std::runtime_error(function.name + ": shared arrays of both kinds are not known");
    const std::string name = function.name;
    functions_.emplace(name, std::move(function));
  }
}

const Function& Module::function(const std::string& name) const {
  const auto found = functions_.find(name);
  if (found == functions_.end()) throw std::runtime_error("no kernel " + name + " in the PTX");
  return found->second;
}

}  // namespace fastrnn::virtual_device

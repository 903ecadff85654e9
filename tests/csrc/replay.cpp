// Makes recorded calls of entry points once more, on the processor that this is compiled for.
//
//     replay RECORDED RESULTS
//
// RECORDED holds, one after the other, for each call: its entry point's name, the packed params, the number
// of buffers, and each buffer's address in the recording process and its bytes before the call. Numbers are 8
// bytes; what has a length comes after it. A field of the params that lies in a recorded buffer is a pointer
// into it. RESULTS gets the bytes of every buffer after its call, in the same order.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu_entry_points.hpp"

namespace {

constexpr uint64_t kAlignment = 64;

[[noreturn]] void fail(const std::string& reason) {
    std::fprintf(stderr, "replay: %s\n", reason.c_str());
    std::exit(1);
}

class Reader {
public:
    explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
        if (file_ == nullptr) fail(std::string("cannot read ") + path);
    }
    ~Reader() { std::fclose(file_); }

    bool at_end() {
        const int next = std::fgetc(file_);
        std::ungetc(next, file_);
        return next == EOF;
    }
    uint64_t number() {
        uint64_t value;
        read(&value, sizeof value);
        return value;
    }
    std::string text() {
        std::string bytes(number(), '\0');
        read(bytes.data(), bytes.size());
        return bytes;
    }
    void read(void* to, size_t bytes) {
        if (std::fread(to, 1, bytes, file_) != bytes) fail("the recording is cut short");
    }

private:
    FILE* file_;
};

// At an address as well aligned as the recorded one, and no better; surrounded by nothing of its neighbours.
struct Buffer {
    uint64_t recorded, size;
    std::vector<char> memory;
    char* bytes;

    explicit Buffer(Reader& from)
        : recorded(from.number()), size(from.number()), memory(size + 2 * kAlignment), bytes(memory.data()) {
        bytes += (recorded - reinterpret_cast<uint64_t>(bytes)) % kAlignment;
        from.read(bytes, size);
    }
    Buffer(Buffer&&) = default;
};

const lmkern::EntryPoint& entry_point(const std::string& name) {
    const lmkern::EntryPoints entries = lmkern::entry_points();
    for (const lmkern::EntryPoint* entry = entries.first; entry < entries.first + entries.count; ++entry)
        if (name == entry->name) return *entry;
    fail("no entry point " + name);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) fail("expected RECORDED RESULTS");
    Reader recorded(arguments[1]);
    FILE* results = std::fopen(arguments[2], "wb");
    if (results == nullptr) fail(std::string("cannot write ") + arguments[2]);
    while (!recorded.at_end()) {
        const lmkern::EntryPoint& entry = entry_point(recorded.text());
        std::string params = recorded.text();
        if (params.size() != entry.params_size) fail(std::string(entry.name) + ": params of another size");
        std::vector<Buffer> buffers;
        for (uint64_t left = recorded.number(); left > 0; --left) buffers.emplace_back(recorded);
        for (size_t field = 0; field < params.size(); field += sizeof(uint64_t)) {
            uint64_t value;
            std::memcpy(&value, &params[field], sizeof value);
            for (const Buffer& buffer : buffers) {
                if (value - buffer.recorded >= buffer.size) continue;
                const char* moved = buffer.bytes + (value - buffer.recorded);
                std::memcpy(&params[field], &moved, sizeof moved);
                break;
            }
        }
        entry.kernel(params.data());
        for (const Buffer& buffer : buffers) std::fwrite(buffer.bytes, 1, buffer.size, results);
    }
    if (std::fclose(results) != 0) fail("the results could not be written");
}

// Workspaces are kept up to a limit and counted. Prints what is wrong and returns 1.
#include <cstdio>
#include <thread>

#include "core/parallel_for.hpp"

using lmkern::Workspace;

namespace {

int failures = 0;

void expect(int64_t bytes, int64_t least, int64_t most, const char* when) {
    if (bytes >= least && bytes <= most) return;
    std::printf("%s: %lld bytes held, expected %lld to %lld\n", when, static_cast<long long>(bytes),
                static_cast<long long>(least), static_cast<long long>(most));
    failures = 1;
}

void use(size_t bytes) {
    lmkern::parallel_for(2, 1, [&](int64_t) {
        Workspace& workspace = Workspace::of_this_thread();
        workspace.reserve(bytes);
        char* room = workspace.take<char>(static_cast<int64_t>(bytes));
        room[0] = room[bytes - 1] = 1;
        expect(Workspace::bytes_of_all_threads(), static_cast<int64_t>(bytes), INT64_MAX, "within a task");
    });
}

}  // namespace

int main() {
    constexpr int64_t small = 1 << 20, slack = 1 << 16, kept = Workspace::kKept;
    expect(Workspace::bytes_of_all_threads(), 0, 0, "before any use");
    use(small);
    expect(Workspace::bytes_of_all_threads(), small, small + slack, "after a small use");
    use(small / 2);
    expect(Workspace::bytes_of_all_threads(), small, small + slack, "after a smaller one");
    std::thread([] { use(small); }).join();
    expect(Workspace::bytes_of_all_threads(), small, small + slack, "after the end of another thread");
    use(2 * kept);
    expect(Workspace::bytes_of_all_threads(), 0, 0, "after one above the limit");
    use(small);
    expect(Workspace::bytes_of_all_threads(), small, small + slack, "after another small one");
    return failures;
}

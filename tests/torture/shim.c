/* Counts the system calls that a process makes below one directory, and makes one of them fail, tear or kill.

Preloaded into every process of a campaign (LD_PRELOAD). All of them, forked and started anew, share one control block,
a mapped file whose path is in TORTURE_CONTROL; shim.py writes it. Nothing happens until it is armed.

A call is inside if its path, or the path that its descriptor was opened by, lies below the control block's root. Calls
are counted in the order in which they begin, over all processes and threads. With recording on, a call and its line in
the log are one step: the log is then the order in which a file system has seen the calls. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, CREATE, WRITE, SYNC, DIRSYNC, RENAME, UNLINK, MKDIR, RMDIR, LINK, TRUNCATE, READ, KINDS };
enum action { NOTHING, KILL, KILL_AFTER, TEAR, FAIL, FAIL_AFTER, SHORT, STOP };

#define PATHS 1024

struct control {
    atomic_uint armed;
    atomic_uint seen;      /* calls counted so far */
    atomic_uint struck;    /* calls that the fault has happened to */
    unsigned mask;         /* bits of the kinds that are counted */
    unsigned nth;          /* the call that the fault happens to, from 0 */
    unsigned action;
    unsigned error;        /* errno of a call that fails */
    unsigned lasting;      /* whether all later calls, of the same kind, fail too */
    unsigned recording;
    unsigned struck_kind;
    pthread_mutex_t order; /* held over a recorded call */
    char root[PATHS];
    char log[PATHS];
};

struct record {
    unsigned kind;
    unsigned made;         /* CREATE: whether the file is new */
    unsigned long inode;   /* of the file or directory, or of what a name is given to */
    long offset;           /* WRITE: where; TRUNCATE: the length */
    unsigned path, other, data; /* bytes of each that follow; paths begin behind the root */
};

static struct control *control;
static int log_fd = -1;
static char inside_fd[65536];
static __thread int busy;

#define REAL(name) ((__typeof__(&name))real_##name)
/* All calls that are replaced. */
#define CALLS(X) \
    X(open) X(open64) X(openat) X(openat64) X(creat) X(fopen) X(fopen64) X(close) X(write) X(pwrite) \
    X(pwrite64) X(writev) X(pwritev) X(pwritev64) X(fsync) X(fdatasync) X(rename) X(renameat) X(renameat2) \
    X(unlink) X(unlinkat) X(remove) X(rmdir) X(mkdir) X(mkdirat) X(link) X(linkat) X(symlink) X(symlinkat) \
    X(ftruncate) X(ftruncate64) X(sendfile) X(sendfile64) X(copy_file_range) X(read) X(pread) X(pread64) \
    X(preadv) X(preadv64)

#define DECLARE(name) static void *real_##name;
CALLS(DECLARE)

static void forked(void) { log_fd = -1; }

__attribute__((constructor)) static void start(void) {
#define FIND(name) real_##name = dlsym(RTLD_NEXT, #name);
    CALLS(FIND)
    const char *path = getenv("TORTURE_CONTROL");
    if (path == NULL) return;
    int fd = REAL(open)(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *mapped = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REAL(close)(fd);
    if (mapped == MAP_FAILED) abort();
    control = mapped;
    pthread_atfork(NULL, NULL, forked);
}

/* What the control block's size and the places in it are, for shim.py. */
void torture_layout(size_t places[12]) {
    places[0] = sizeof(struct control);
#define PLACE(number, field) places[number] = offsetof(struct control, field)
    PLACE(1, armed); PLACE(2, seen); PLACE(3, struck); PLACE(4, mask); PLACE(5, nth); PLACE(6, action);
    PLACE(7, error); PLACE(8, lasting); PLACE(9, recording); PLACE(10, root); PLACE(11, log);
}

void torture_make_lock(void *mapped) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&((struct control *)mapped)->order, &attributes);
}

static int armed(void) { return control != NULL && !busy && atomic_load(&control->armed); }

/* Make a path absolute, without asking the file system, and tell what follows the root; NULL for paths outside. */
static const char *below(int dirfd, const char *path, char whole[PATH_MAX * 2]) {
    if (path == NULL) return NULL;
    whole[0] = 0;
    if (path[0] != '/') {
        if (dirfd == AT_FDCWD) {
            if (getcwd(whole, PATH_MAX) == NULL) return NULL;
        } else {
            char name[64];
            snprintf(name, sizeof name, "/proc/self/fd/%d", dirfd);
            ssize_t length = readlink(name, whole, PATH_MAX - 1);
            if (length < 0) return NULL;
            whole[length] = 0;
        }
        strcat(whole, "/");
    }
    strncat(whole, path, PATH_MAX - 1);
    size_t length = strlen(control->root);
    if (strncmp(whole, control->root, length) != 0) return NULL;
    if (whole[length] == 0) return whole + length;
    if (whole[length] != '/') return NULL;
    return whole + length + 1;
}

static const char *below_fd(int fd, char whole[PATH_MAX * 2]) {
    char name[64];
    char found[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, found, PATH_MAX - 1);
    if (length < 0) return NULL;
    found[length] = 0;
    return below(AT_FDCWD, found, whole);
}

static void log_call(struct record entry, const char *path, const char *other, const struct iovec *data, int parts) {
    if (log_fd < 0) log_fd = REAL(open)(control->log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    entry.path = path ? strlen(path) : 0;
    entry.other = other ? strlen(other) : 0;
    entry.data = 0;
    for (int at = 0; at < parts; at++) entry.data += data[at].iov_len;
    REAL(write)(log_fd, &entry, sizeof entry);
    if (entry.path) REAL(write)(log_fd, path, entry.path);
    if (entry.other) REAL(write)(log_fd, other, entry.other);
    for (int at = 0; at < parts; at++) REAL(write)(log_fd, data[at].iov_base, data[at].iov_len);
}

struct turn {
    int counted, strikes;
};

static void end_order(void) {
    if (control->recording) pthread_mutex_unlock(&control->order);
}

/* Count a call. Kills or stops if that is due now; what is due during or after the call is told by the turn. */
static struct turn begin(enum kind kind) {
    struct turn turn = {0, 0};
    if (!(control->mask & (1u << kind))) return turn;
    busy = 1;
    turn.counted = 1;
    if (control->recording && pthread_mutex_lock(&control->order) == EOWNERDEAD)
        pthread_mutex_consistent(&control->order);
    unsigned number = atomic_fetch_add(&control->seen, 1);
    if (control->action == NOTHING) return turn;
    if (number == control->nth) {
        control->struck_kind = kind;
        turn.strikes = 1;
    } else if (control->lasting && number > control->nth && kind == control->struck_kind) {
        turn.strikes = 1;
    }
    if (!turn.strikes) return turn;
    atomic_fetch_add(&control->struck, 1);
    if (control->action == KILL) kill(getpid(), SIGKILL);
    if (control->action == STOP) kill(getpid(), SIGSTOP);
    return turn;
}

static int fails(struct turn turn) { return turn.strikes && control->action == FAIL; }

static long end(struct turn turn, long result) {
    int saved = errno;
    if (turn.counted) {
        end_order();
        busy = 0;
    }
    if (turn.strikes) {
        if (control->action == KILL_AFTER || control->action == TEAR) kill(getpid(), SIGKILL);
        if (control->action == FAIL || control->action == FAIL_AFTER) {
            errno = control->error;
            return -1;
        }
    }
    errno = saved;
    return result;
}

static unsigned long inode_of(int fd) {
    struct stat found;
    return fstat(fd, &found) == 0 ? found.st_ino : 0;
}

static unsigned long inode_at(const char *path) {
    char whole[PATH_MAX * 2];
    struct stat found;
    snprintf(whole, sizeof whole, "%s/%s", control->root, path);
    return lstat(whole, &found) == 0 ? found.st_ino : 0;
}

static int opened(int fd, int inside) {
    if (fd >= 0 && fd < (int)sizeof inside_fd) inside_fd[fd] = inside;
    return fd;
}

static int is_inside(int fd) { return fd >= 0 && fd < (int)sizeof inside_fd && inside_fd[fd]; }

/* The real call is made by openat, whichever was called. */
static int open_below(const char *path, int flags, mode_t mode, int dirfd, const char *given) {
    enum kind kind = flags & (O_CREAT | O_TRUNC) ? CREATE : flags & (O_WRONLY | O_RDWR) ? CREATE : OPEN;
    struct turn turn = begin(kind);
    int fd = -1;
    int was_there = inode_at(path) != 0;
    if (!fails(turn)) {
        fd = REAL(openat)(dirfd, given, flags, mode);
        if (fd >= 0 && kind == CREATE && turn.counted && control->recording) {
            log_call((struct record){.kind = CREATE, .made = !was_there, .inode = inode_of(fd)}, path, NULL, NULL, 0);
            if (was_there && flags & O_TRUNC)
                log_call((struct record){.kind = TRUNCATE, .inode = inode_of(fd)}, NULL, NULL, NULL, 0);
        }
    }
    if (turn.strikes && control->action == FAIL_AFTER && fd >= 0) {
        REAL(close)(fd);
        fd = -1;
    }
    return opened(end(turn, fd), 1);
}

static int open_any(int dirfd, const char *path, int flags, mode_t mode) {
    char whole[PATH_MAX * 2];
    const char *inside = armed() ? below(dirfd, path, whole) : NULL;
    if (inside == NULL) return opened(REAL(openat)(dirfd, path, flags, mode), 0);
    return open_below(inside, flags, mode, dirfd, path);
}

#define MODE_OF(flags)                                    \
    mode_t mode = 0;                                      \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {              \
        va_list rest;                                     \
        va_start(rest, flags);                            \
        mode = va_arg(rest, mode_t);                      \
        va_end(rest);                                     \
    }

int open(const char *path, int flags, ...) { MODE_OF(flags) return open_any(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE_OF(flags) return open_any(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int dirfd, const char *path, int flags, ...) { MODE_OF(flags) return open_any(dirfd, path, flags, mode); }
int openat64(int dirfd, const char *path, int flags, ...) { MODE_OF(flags) return open_any(dirfd, path, flags | O_LARGEFILE, mode); }
int creat(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

static FILE *fopen_any(const char *path, const char *mode) {
    char whole[PATH_MAX * 2];
    const char *inside = armed() ? below(AT_FDCWD, path, whole) : NULL;
    if (inside == NULL) {
        FILE *file = REAL(fopen64)(path, mode);
        if (file != NULL) opened(fileno(file), 0);
        return file;
    }
    int plus = strchr(mode, '+') != NULL;
    int flags = mode[0] == 'r' ? (plus ? O_RDWR : O_RDONLY)
                               : (plus ? O_RDWR : O_WRONLY) | O_CREAT | (mode[0] == 'w' ? O_TRUNC : O_APPEND);
    int fd = open_below(inside, flags, 0666, AT_FDCWD, path);
    return fd < 0 ? NULL : fdopen(fd, mode);
}

FILE *fopen(const char *path, const char *mode) { return fopen_any(path, mode); }
FILE *fopen64(const char *path, const char *mode) { return fopen_any(path, mode); }

int close(int fd) {
    opened(fd, 0);
    return REAL(close)(fd);
}

/* The first half of the bytes. Returns the number of parts; the last one may be cut. */
static int halved(const struct iovec *parts, int count, struct iovec *half) {
    size_t left = 0;
    for (int at = 0; at < count; at++) left += parts[at].iov_len;
    left = left > 1 ? left / 2 : left;
    int number = 0;
    for (; number < count && left > 0; number++) {
        half[number] = parts[number];
        if (half[number].iov_len > left) half[number].iov_len = left;
        left -= half[number].iov_len;
    }
    return number;
}

static ssize_t write_any(int fd, const struct iovec *parts, int count, off_t offset, int positioned) {
    if (!armed() || !is_inside(fd))
        return positioned ? REAL(pwritev64)(fd, parts, count, offset) : REAL(writev)(fd, parts, count);
    struct turn turn = begin(WRITE);
    struct iovec half[IOV_MAX];
    ssize_t done = -1;
    if (!fails(turn)) {
        if (turn.strikes && (control->action == TEAR || control->action == SHORT)) {
            count = halved(parts, count, half);
            parts = half;
        }
        off_t at = positioned ? offset : lseek(fd, 0, SEEK_CUR);
        done = positioned ? REAL(pwritev64)(fd, parts, count, offset) : REAL(writev)(fd, parts, count);
        if (done >= 0 && turn.counted && control->recording) {
            struct iovec taken[IOV_MAX];
            size_t left = done;
            int number = 0;
            for (; number < count && left > 0; number++) {
                taken[number] = parts[number];
                if (taken[number].iov_len > left) taken[number].iov_len = left;
                left -= taken[number].iov_len;
            }
            log_call((struct record){.kind = WRITE, .inode = inode_of(fd), .offset = at}, NULL, NULL, taken, number);
        }
    }
    return end(turn, done);
}

/* Python calls these for os.pwritev and os.preadv. */
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    (void)flags;
    return offset < 0 ? writev(fd, parts, count) : write_any(fd, parts, count, offset, 1);
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    return pwritev2(fd, parts, count, offset, flags);
}

ssize_t write(int fd, const void *data, size_t size) {
    if (!armed() || !is_inside(fd)) return REAL(write)(fd, data, size);
    struct iovec part = {(void *)data, size};
    return write_any(fd, &part, 1, 0, 0);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    struct iovec part = {(void *)data, size};
    return write_any(fd, &part, 1, offset, 1);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) {
    struct iovec part = {(void *)data, size};
    return write_any(fd, &part, 1, offset, 1);
}

ssize_t writev(int fd, const struct iovec *parts, int count) { return write_any(fd, parts, count, 0, 0); }
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) { return write_any(fd, parts, count, offset, 1); }
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t offset) { return write_any(fd, parts, count, offset, 1); }

/* Copies inside the kernel are refused, so that callers fall back on writes, which are seen. */
static int refuses_copy(int fd) {
    if (!armed() || !is_inside(fd)) return 0;
    errno = ENOSYS;
    return 1;
}

ssize_t sendfile(int out, int in, off_t *offset, size_t count) {
    return refuses_copy(out) ? -1 : REAL(sendfile)(out, in, offset, count);
}
ssize_t sendfile64(int out, int in, off_t *offset, size_t count) {
    return refuses_copy(out) ? -1 : REAL(sendfile64)(out, in, offset, count);
}
ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t size, unsigned flags) {
    return refuses_copy(out) ? -1 : REAL(copy_file_range)(in, from, out, to, size, flags);
}

static int sync_any(int fd, int (*call)(int)) {
    if (!armed() || !is_inside(fd)) return call(fd);
    struct stat found;
    int is_directory = fstat(fd, &found) == 0 && S_ISDIR(found.st_mode);
    struct turn turn = begin(is_directory ? DIRSYNC : SYNC);
    int result = -1;
    if (!fails(turn)) {
        result = call(fd);
        if (result == 0 && turn.counted && control->recording) {
            char whole[PATH_MAX * 2];
            const char *path = is_directory ? below_fd(fd, whole) : NULL;
            log_call((struct record){.kind = is_directory ? DIRSYNC : SYNC, .inode = found.st_ino}, path, NULL, NULL, 0);
        }
    }
    return end(turn, result);
}

int fsync(int fd) { return sync_any(fd, REAL(fsync)); }
int fdatasync(int fd) { return sync_any(fd, REAL(fdatasync)); }

static int truncate_any(int fd, off_t length) {
    if (!armed() || !is_inside(fd)) return REAL(ftruncate64)(fd, length);
    struct turn turn = begin(TRUNCATE);
    int result = -1;
    if (!fails(turn)) {
        result = REAL(ftruncate64)(fd, length);
        if (result == 0 && turn.counted && control->recording)
            log_call((struct record){.kind = TRUNCATE, .inode = inode_of(fd), .offset = length}, NULL, NULL, NULL, 0);
    }
    return end(turn, result);
}

int ftruncate(int fd, off_t length) { return truncate_any(fd, length); }
int ftruncate64(int fd, off_t length) { return truncate_any(fd, length); }

/* A call that changes names: `call` is evaluated once, between the counting and the log. */
#define ON_NAMES(kind_, dirfd_, path_, other_dirfd_, other_, call)                                          \
    char whole[PATH_MAX * 2], whole_other[PATH_MAX * 2];                                                    \
    const char *inside = armed() ? below(dirfd_, path_, whole) : NULL;                                      \
    const char *other_inside = armed() && (other_) ? below(other_dirfd_, other_, whole_other) : NULL;       \
    if (inside == NULL && other_inside == NULL) return call;                                                \
    struct turn turn = begin(kind_);                                                                        \
    int result = -1;                                                                                        \
    if (!fails(turn)) {                                                                                     \
        int keeps = turn.counted && control->recording;                                                     \
        unsigned long inode = keeps && inside ? inode_at(inside) : 0;                                       \
        result = call;                                                                                      \
        if (keeps && inode == 0 && (other_inside || inside)) inode = inode_at(other_inside ? other_inside : inside); \
        if (result == 0 && keeps)                                                                           \
            log_call((struct record){.kind = kind_, .inode = inode}, inside, other_inside, NULL, 0);        \
    }                                                                                                       \
    return end(turn, result)

int rename(const char *from, const char *to) { ON_NAMES(RENAME, AT_FDCWD, from, AT_FDCWD, to, REAL(rename)(from, to)); }
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    ON_NAMES(RENAME, from_dir, from, to_dir, to, REAL(renameat)(from_dir, from, to_dir, to));
}
int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    ON_NAMES(RENAME, from_dir, from, to_dir, to, REAL(renameat2)(from_dir, from, to_dir, to, flags));
}
int unlink(const char *path) { ON_NAMES(UNLINK, AT_FDCWD, path, 0, NULL, REAL(unlink)(path)); }
int remove(const char *path) { ON_NAMES(UNLINK, AT_FDCWD, path, 0, NULL, REAL(remove)(path)); }
int rmdir(const char *path) { ON_NAMES(RMDIR, AT_FDCWD, path, 0, NULL, REAL(rmdir)(path)); }
int unlinkat(int dirfd, const char *path, int flags) {
    enum kind kind = flags & AT_REMOVEDIR ? RMDIR : UNLINK;
    ON_NAMES(kind, dirfd, path, 0, NULL, REAL(unlinkat)(dirfd, path, flags));
}
int mkdir(const char *path, mode_t mode) { ON_NAMES(MKDIR, AT_FDCWD, path, 0, NULL, REAL(mkdir)(path, mode)); }
int mkdirat(int dirfd, const char *path, mode_t mode) {
    ON_NAMES(MKDIR, dirfd, path, 0, NULL, REAL(mkdirat)(dirfd, path, mode));
}
int link(const char *from, const char *to) { ON_NAMES(LINK, AT_FDCWD, from, AT_FDCWD, to, REAL(link)(from, to)); }
int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    ON_NAMES(LINK, from_dir, from, to_dir, to, REAL(linkat)(from_dir, from, to_dir, to, flags));
}
/* The other name is the link; what it says is logged as its content. */
static int symlink_any(const char *target, int dirfd, const char *path) {
    char whole[PATH_MAX * 2];
    const char *inside = armed() ? below(dirfd, path, whole) : NULL;
    if (inside == NULL) return REAL(symlinkat)(target, dirfd, path);
    struct turn turn = begin(LINK);
    int result = -1;
    if (!fails(turn)) {
        result = REAL(symlinkat)(target, dirfd, path);
        struct iovec text = {(void *)target, strlen(target)};
        if (result == 0 && turn.counted && control->recording)
            log_call((struct record){.kind = LINK, .inode = inode_at(inside)}, NULL, inside, &text, 1);
    }
    return end(turn, result);
}
int symlink(const char *target, const char *path) { return symlink_any(target, AT_FDCWD, path); }
int symlinkat(const char *target, int dirfd, const char *path) { return symlink_any(target, dirfd, path); }

static ssize_t read_any(int fd, const struct iovec *parts, int count, off_t offset, int positioned) {
    struct turn turn = begin(READ);
    struct iovec half[IOV_MAX];
    ssize_t done = -1;
    if (!fails(turn)) {
        if (turn.strikes && control->action == SHORT) {
            count = halved(parts, count, half);
            parts = half;
        }
        done = positioned ? REAL(preadv64)(fd, parts, count, offset) : readv(fd, parts, count);
    }
    return end(turn, done);
}

ssize_t read(int fd, void *data, size_t size) {
    if (!armed() || !is_inside(fd)) return REAL(read)(fd, data, size);
    struct iovec part = {data, size};
    return read_any(fd, &part, 1, 0, 0);
}
ssize_t pread(int fd, void *data, size_t size, off_t offset) {
    if (!armed() || !is_inside(fd)) return REAL(pread64)(fd, data, size, offset);
    struct iovec part = {data, size};
    return read_any(fd, &part, 1, offset, 1);
}
ssize_t pread64(int fd, void *data, size_t size, off_t offset) {
    if (!armed() || !is_inside(fd)) return REAL(pread64)(fd, data, size, offset);
    struct iovec part = {data, size};
    return read_any(fd, &part, 1, offset, 1);
}
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) {
    if (!armed() || !is_inside(fd)) return REAL(preadv64)(fd, parts, count, offset);
    return read_any(fd, parts, count, offset, 1);
}
ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t offset) {
    if (!armed() || !is_inside(fd)) return REAL(preadv64)(fd, parts, count, offset);
    return read_any(fd, parts, count, offset, 1);
}
ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    (void)flags;
    return offset < 0 ? readv(fd, parts, count) : preadv(fd, parts, count, offset);
}
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    return preadv2(fd, parts, count, offset, flags);
}

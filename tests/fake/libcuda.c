/* A stand-in for NVIDIA's driver, for tests on machines without a GPU.

   "Device memory" is memfds named fake-gpu-NUMBER: data really moves between processes, references are really counted (by the
   kernel, across processes), and what was not freed can be seen in /proc. Streams are queues of operations that run at
   once unless a test holds them back. Every call is noted with its thread, and any call can be made to fail.

   Capture of graphs has the rules of "Stream Management" and of cuThreadExchangeStreamCaptureMode: a call that conflicts with
   a capture is refused, and spoils it. What is given to a stream that is captured is not done. The default stream waits for
   all that were not made to be independent of it, and they for it; but not those of threads (handle 2), unlike the real one:
   so tests see which thread has asked for its own.

   FAKE_CUDA_BROKEN names what this driver does wrong, for tests of the checks that a real one is to pass.

   Functions have the plain names by which cuGetProcAddress is asked for them. What the tests themselves call begins with
   `fake`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef unsigned long long ptr_t;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, DEVICE_UNAVAILABLE = 46, NO_DEVICE = 100, INVALID_DEVICE = 101,
       INVALID_CONTEXT = 201, MAP_FAILED_ = 205, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
       NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903,
       CAPTURE_IMPLICIT = 906, CAPTURED_EVENT = 907 };
#define GRAIN (2ull << 20)
#define MOST 65536

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int init_pid;
static __thread int current = -1; /* the context of this thread: its device */

/* --- the log, and failures on order --- */

static char *log_text;
static size_t log_used, log_room;
static struct { char name[64]; int after, status, times; } wrong[32];

static int enter(const char *name) {
    int status = OK;
    pthread_mutex_lock(&lock);
    if (log_used + 128 > log_room) log_text = realloc(log_text, log_room = 2 * log_room + 4096);
    log_used += snprintf(log_text + log_used, 128, "%s %d\n", name, (int)syscall(SYS_gettid));
    for (int i = 0; i < 32; i++)
        if (wrong[i].times && !strcmp(wrong[i].name, name)) {
            if (wrong[i].after) { wrong[i].after--; continue; }
            wrong[i].times--;
            status = wrong[i].status;
            break;
        }
    pthread_mutex_unlock(&lock);
    return status;
}

size_t fakeLog(char *out, size_t room) { /* what was called since the last time; its length if there is no room */
    pthread_mutex_lock(&lock);
    size_t n = log_used;
    if (out && n <= room) { memcpy(out, log_text, n); log_used = 0; }
    pthread_mutex_unlock(&lock);
    return n;
}

void fakeFail(const char *name, int after, int status, int times) {
    for (int i = 0; i < 32; i++)
        if (!wrong[i].times) {
            snprintf(wrong[i].name, 64, "%s", name);
            wrong[i].after = after, wrong[i].status = status, wrong[i].times = times;
            return;
        }
}

void fakeMend(void) { memset(wrong, 0, sizeof wrong); }

/* --- streams, and what of them is captured --- */

struct op;
struct stream { struct op *first, *last; int held, running, gone, blocking, of_thread, capture, mode, owner, spoiled; struct stream *next; };
static struct stream usual = {.blocking = 1}, *streams = &usual;
static __thread struct stream *mine; /* handle 2 is another stream in each thread */
static __thread int thread_mode; /* 0: global, 1: thread-local, 2: relaxed */

static struct stream *stream_of(void *s) {
    if ((uintptr_t)s < 2) return &usual;
    if ((uintptr_t)s > 2) return s;
    if (!mine) {
        mine = calloc(1, sizeof *mine);
        mine->blocking = mine->of_thread = 1;
        pthread_mutex_lock(&lock);
        mine->next = streams->next, streams->next = mine;
        pthread_mutex_unlock(&lock);
    }
    return mine;
}

enum { ALL, UNSAFE_HERE, BLOCKING };
static int conflict(int kind, int status) { /* spoil the captures that a call of this kind conflicts with */
    int found = OK, me = (int)syscall(SYS_gettid);
    pthread_mutex_lock(&lock);
    for (struct stream *s = streams; s; s = s->next) {
        if (!s->capture) continue;
        int own = s->owner == me, hit = kind == ALL || (kind == BLOCKING && s->blocking);
        if (kind == UNSAFE_HERE) hit = thread_mode < 2 && (own ? s->mode < 2 : !thread_mode && !s->mode);
        if (hit) s->spoiled = 1, found = status;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

#define BEGIN do { int s_ = init_pid != getpid() ? NOT_INITIALIZED : enter(__func__); if (s_) return s_; } while (0)
#define IN_CONTEXT do { if (current < 0) return INVALID_CONTEXT; } while (0)
#define UNSAFE do { int s_ = conflict(UNSAFE_HERE, CAPTURE_UNSUPPORTED); if (s_) return s_; } while (0)
#define LEGACY(s) do { int s_ = stream_of(s) == &usual ? conflict(BLOCKING, CAPTURE_IMPLICIT) : OK; if (s_) return s_; } while (0)
#define NOT_CAPTURED(s) do { LEGACY(s); if (stream_of(s)->capture) { stream_of(s)->spoiled = 1; return CAPTURE_UNSUPPORTED; } } while (0)

/* the tables of memory are for one thread at a time */
static pthread_mutex_t tables = PTHREAD_MUTEX_INITIALIZER;
static int lock_tables(void) { return pthread_mutex_lock(&tables); }
static void unlock_tables(int *unused) { (void)unused; pthread_mutex_unlock(&tables); }
#define GUARD int guard_ __attribute__((cleanup(unlock_tables), unused)) = lock_tables()

/* --- devices --- */

static int seen[16], count;
static int primary[16];
static size_t limit = 1ull << 40; /* bytes a device has, for this process */
static size_t used;

static int number(const char *name, int other) {
    const char *text = getenv(name);
    return text && *text ? atoi(text) : other;
}

static int broken(const char *what) {
    const char *text = getenv("FAKE_CUDA_BROKEN");
    return text && strstr(text, what);
}

static void uuid_of(int physical, unsigned char *out) { memset(out, 0x11 * (physical + 1), 16); }

static void look(void) { /* CUDA_VISIBLE_DEVICES: the first that is invalid hides all behind it */
    int all = number("FAKE_CUDA_DEVICES", 2);
    const char *text = broken("visible") ? NULL : getenv("CUDA_VISIBLE_DEVICES");
    count = 0;
    if (!text) { /* the fastest first, which need not be the order of the bus */
        for (int i = 0; i < all; i++) seen[count++] = number("FAKE_CUDA_BACKWARDS", 0) ? all - 1 - i : i;
        return;
    }
    char copy[512], *rest = copy, *one;
    snprintf(copy, sizeof copy, "%s", text);
    while ((one = strsep(&rest, ",")) && *one) {
        int found = -1;
        if (!strncmp(one, "GPU-", 4)) {
            for (int i = 0; i < all; i++) {
                char hex[16];
                snprintf(hex, sizeof hex, "%02x", 0x11 * (i + 1));
                if (!strncmp(one + 4, hex, 2)) found = i;
            }
        } else if (atoi(one) < all) found = atoi(one);
        if (found < 0) return;
        seen[count++] = found;
    }
}

int cuInit(unsigned flags) {
    (void)flags;
    if (init_pid && init_pid != getpid()) return NOT_INITIALIZED;
    int s = enter(__func__);
    if (s) return s;
    look();
    if (!count) return NO_DEVICE;
    init_pid = getpid();
    return OK;
}

int cuDriverGetVersion(int *v) { *v = number("FAKE_CUDA_VERSION", 13000); return OK; }
int cuDeviceGetCount(int *n) { BEGIN; *n = count; return OK; }
int cuDeviceGet(int *d, int ordinal) { BEGIN; if (ordinal < 0 || ordinal >= count) return INVALID_DEVICE; *d = ordinal; return OK; }
int cuDeviceGetUuid(unsigned char *out, int d) { BEGIN; uuid_of(seen[d], out); return OK; }
int cuDeviceTotalMem(size_t *n, int d) { (void)d; BEGIN; *n = limit; return OK; }
int cuDeviceGetName(char *out, int n, int d) {
    BEGIN;
    if (number("FAKE_CUDA_LOST", -1) == d) return DEVICE_UNAVAILABLE;
    snprintf(out, n, number("FAKE_CUDA_MIG", 0) ? "Fake GPU %d MIG 1g.10gb" : "Fake GPU %d", seen[d]);
    return OK;
}
int cuDeviceGetAttribute(int *out, int what, int d) {
    (void)d;
    BEGIN;
    char name[64];
    snprintf(name, sizeof name, "FAKE_CUDA_ATTRIBUTE_%d", what);
    *out = number(name, 1); /* all that it may be asked for, it can */
    return OK;
}
int cuDevicePrimaryCtxRetain(void **c, int d) { BEGIN; UNSAFE; primary[d]++; *c = (void *)(uintptr_t)(d + 1); return OK; }
int cuDevicePrimaryCtxRelease(int d) { BEGIN; if (!primary[d]) return INVALID_CONTEXT; primary[d]--; return OK; }
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { BEGIN; *flags = 0; *active = primary[d] > 0; return OK; }
int cuThreadExchangeStreamCaptureMode(int *mode) {
    BEGIN;
    int before = thread_mode;
    if (!broken("relaxed")) thread_mode = *mode;
    *mode = before;
    return OK;
}
static __thread int below[16], depth;
int cuCtxPushCurrent(void *c) { BEGIN; below[depth++] = current; current = (int)(uintptr_t)c - 1; return OK; }
int cuCtxPopCurrent(void **c) { BEGIN; if (!depth) return INVALID_CONTEXT; *c = (void *)(uintptr_t)(current + 1); current = below[--depth]; return OK; }
int cuCtxSetCurrent(void *c) { BEGIN; current = (int)(uintptr_t)c - 1; return OK; }
int cuCtxGetCurrent(void **c) { BEGIN; *c = (void *)(uintptr_t)(current + 1); return OK; }
int cuMemGetInfo(size_t *f, size_t *t) { BEGIN; IN_CONTEXT; *f = limit - used; *t = limit; return OK; }
int cuGetErrorName(int s, const char **out) { static __thread char t[40]; snprintf(t, 40, "CUDA_ERROR_FAKE_%d", s); *out = t; return OK; }
int cuGetErrorString(int s, const char **out) { (void)s; *out = "as the test has ordered"; return OK; }
void fakeLimit(size_t bytes) { limit = bytes; }

/* --- memory --- */

enum { VMM = 1, PLAIN, MANAGED, POOLED, OPENED, TAKEN };
struct phys { int fd, refs, device, kinds; size_t size; };
struct handle64 { int magic, pid, fd; size_t size, inset; ptr_t serial; char rest[64 - 40]; };
struct pool { int fd, device, shared, imported, is_default; };
static struct part { ptr_t at; size_t size; struct phys *phys; int kind, opens; struct handle64 from; struct pool *pool; } parts[MOST];
static struct { ptr_t at; size_t size; } reserved[MOST];
static int most_parts, most_reserved, live_phys, live_scratch;
static struct { unsigned value[4]; int used; } scratch[64]; /* of 4 bytes each: no memory of which a test wants to hear */

static struct phys *new_phys(size_t size, int device, int kinds, int fd) {
    struct phys *p = calloc(1, sizeof *p);
    if (fd < 0) {
        char name[64]; /* that of the tests which run, so that others beside them are not counted */
        snprintf(name, sizeof name, "fake-gpu-%d", number("FAKE_CUDA_NAME", 0));
        fd = memfd_create(name, MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, size)) { free(p); return NULL; }
        used += size;
    }
    p->fd = fd, p->refs = 1, p->device = device, p->kinds = kinds, p->size = size;
    live_phys++;
    return p;
}
static void drop(struct phys *p, int counts) {
    if (--p->refs) return;
    if (counts && !broken("memory")) used -= p->size;
    close(p->fd);
    free(p);
    live_phys--;
}
static struct part *part_at(ptr_t at) {
    for (int i = 0; i < most_parts; i++)
        if (parts[i].size && at >= parts[i].at && at < parts[i].at + parts[i].size) return &parts[i];
    return NULL;
}
static struct part *new_part(ptr_t at, size_t size, struct phys *p, int kind) {
    int i = 0;
    while (i < most_parts && parts[i].size) i++;
    if (i == MOST) abort();
    if (i == most_parts) most_parts++;
    parts[i] = (struct part){.at = at, .size = size, .phys = p, .kind = kind, .opens = 1};
    return &parts[i];
}
static ptr_t map_whole(struct phys *p, int kind, struct part **out) {
    size_t size = (p->size + 4095) & ~4095ull;
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, p->fd, 0);
    if (at == MAP_FAILED) return 0;
    struct part *one = new_part((ptr_t)at, size, p, kind);
    if (out) *out = one;
    return (ptr_t)at;
}

struct prop { int type, handles; struct { int type, id; } location; void *meta; unsigned char flags[8]; };

int cuMemGetAllocationGranularity(size_t *out, const struct prop *p, int option) { (void)p; (void)option; BEGIN; GUARD; *out = GRAIN; return OK; }
int cuMemCreate(void **out, size_t size, const struct prop *p, unsigned long long flags) {
    (void)flags;
    BEGIN; UNSAFE; GUARD;
    if (!size || size % GRAIN || p->type != 1 || p->location.type != 1) return INVALID_VALUE;
    if (p->location.id < 0 || p->location.id >= count) return INVALID_DEVICE;
    if (used + size > limit) return OUT_OF_MEMORY;
    *out = new_phys(size, p->location.id, p->handles, -1);
    return *out ? OK : OUT_OF_MEMORY;
}
int cuMemRelease(struct phys *p) { BEGIN; UNSAFE; GUARD; drop(p, 1); return OK; }
int cuMemExportToShareableHandle(int *fd, struct phys *p, int kind, unsigned long long flags) {
    (void)flags;
    BEGIN; UNSAFE; GUARD;
    if (kind != 1 || !(p->kinds & 1)) return NOT_SUPPORTED;
    *fd = fcntl(p->fd, F_DUPFD, 3); /* inheritable, as the real one may be: who gets it must see to that */
    return *fd < 0 ? INVALID_VALUE : OK;
}
int cuMemImportFromShareableHandle(void **out, void *fd, int kind) {
    BEGIN; UNSAFE; GUARD;
    struct stat st;
    char path[64], name[64] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", (int)(intptr_t)fd);
    if (kind != 1 || readlink(path, name, 63) < 0 || strncmp(name, "/memfd:fake-gpu", 15)) return INVALID_VALUE;
    int mine = fcntl((int)(intptr_t)fd, F_DUPFD_CLOEXEC, 3);
    if (mine < 0 || fstat(mine, &st)) return INVALID_VALUE;
    if (broken("imports")) { /* it is other memory */
        close(mine);
        *out = new_phys(st.st_size, 0, 1, -1);
        return OK;
    }
    used += st.st_size;
    *out = new_phys(st.st_size, 0, 1, mine);
    return OK;
}
int cuMemRetainAllocationHandle(void **out, void *at) {
    BEGIN; GUARD;
    struct part *one = part_at((ptr_t)at);
    if (!one || one->kind != VMM) return INVALID_VALUE;
    one->phys->refs++;
    *out = one->phys;
    return OK;
}
int cuMemAddressReserve(ptr_t *out, size_t size, size_t align, ptr_t hint, unsigned long long flags) {
    (void)align, (void)hint, (void)flags;
    BEGIN; UNSAFE; GUARD;
    if (!size || size % GRAIN) return INVALID_VALUE;
    char *raw = mmap(NULL, size + GRAIN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return OUT_OF_MEMORY;
    char *at = (char *)(((ptr_t)raw + GRAIN - 1) / GRAIN * GRAIN);
    if (at > raw) munmap(raw, at - raw);
    munmap(at + size, raw + GRAIN - at);
    int i = 0;
    while (i < most_reserved && reserved[i].size) i++;
    if (i == MOST) abort();
    if (i == most_reserved) most_reserved++;
    reserved[i].at = *out = (ptr_t)at, reserved[i].size = size;
    return OK;
}
int cuMemAddressFree(ptr_t at, size_t size) {
    BEGIN; UNSAFE; GUARD;
    for (int i = 0; i < most_reserved; i++)
        if (reserved[i].size == size && reserved[i].at == at) {
            for (int k = 0; k < most_parts; k++)
                if (parts[k].size && parts[k].at >= at && parts[k].at < at + size) return INVALID_VALUE; /* still mapped */
            munmap((void *)at, size);
            reserved[i].size = 0;
            return OK;
        }
    return INVALID_VALUE;
}
int cuMemMap(ptr_t at, size_t size, size_t offset, struct phys *p, unsigned long long flags) {
    (void)flags;
    BEGIN; UNSAFE; GUARD;
    if (offset || !size || size % GRAIN || size > p->size || part_at(at)) return INVALID_VALUE;
    if (mmap((void *)at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, p->fd, 0) == MAP_FAILED) return MAP_FAILED_;
    p->refs++;
    new_part(at, size, p, VMM);
    return OK;
}
struct access { struct { int type, id; } location; int flags; };
int cuMemSetAccess(ptr_t at, size_t size, const struct access *a, size_t n) {
    BEGIN; UNSAFE; GUARD;
    if (n != 1 || a->flags != 3 || a->location.id >= count) return INVALID_VALUE;
    return mprotect((void *)at, size, PROT_READ | PROT_WRITE) ? INVALID_VALUE : OK;
}
int cuMemUnmap(ptr_t at, size_t size) {
    BEGIN; UNSAFE; GUARD;
    ptr_t end = at + size;
    for (ptr_t one = at; one < end;) {
        struct part *p = part_at(one);
        if (!p || p->at != one || p->kind != VMM) return INVALID_VALUE;
        one += p->size;
    }
    for (ptr_t one = at; one < end;) {
        struct part *p = part_at(one);
        size_t step = p->size;
        mmap((void *)one, step, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        struct phys *phys = p->phys;
        p->size = 0;
        drop(phys, 1);
        one += step;
    }
    return OK;
}
int cuMemAlloc(ptr_t *out, size_t size) {
    BEGIN; UNSAFE; GUARD; IN_CONTEXT;
    for (int i = 0; i < 64 && size == 4; i++)
        if (!scratch[i].used) {
            *out = (ptr_t)&scratch[i];
            scratch[i].used = 1, live_scratch++;
            return OK;
        }
    *out = map_whole(new_phys(size, current, 0, -1), PLAIN, NULL);
    return OK;
}
int cuMemAllocManaged(ptr_t *out, size_t size, unsigned flags) {
    (void)flags;
    BEGIN; UNSAFE; GUARD; IN_CONTEXT;
    *out = map_whole(new_phys(size, current, 0, -1), MANAGED, NULL);
    return OK;
}
static int forget(ptr_t at, int kinds) {
    struct part *p = part_at(at);
    if (!p || p->at != at || !(kinds & 1 << p->kind)) return INVALID_VALUE;
    if (--p->opens) return OK;
    if (p->kind < OPENED) memset((void *)p->at, 0xDD, p->phys->size); /* whoever still reads it shall notice */
    munmap((void *)p->at, p->size);
    p->size = 0;
    drop(p->phys, p->kind < OPENED);
    return OK;
}
int cuMemFree(ptr_t at) {
    BEGIN; UNSAFE; GUARD; IN_CONTEXT;
    for (int i = 0; i < 64; i++)
        if ((ptr_t)&scratch[i] == at && scratch[i].used) { /* what is still to be written there does no harm */
            scratch[i].used = 0, live_scratch--;
            return OK;
        }
    return forget(at, 1 << PLAIN | 1 << MANAGED | 1 << POOLED | 1 << TAKEN);
}
int cuMemFreeAsync(ptr_t at, void *stream) { (void)stream; BEGIN; GUARD; IN_CONTEXT; return forget(at, 1 << POOLED | 1 << TAKEN); }

static void fill(struct handle64 *h, struct part *p) {
    memset(h, 0, sizeof *h);
    h->magic = 0xFA4E, h->pid = getpid(), h->fd = p->phys->fd, h->size = p->phys->size;
    struct stat st;
    fstat(p->phys->fd, &st);
    h->serial = st.st_ino;
}
static int open_there(const struct handle64 *h) {
    char path[64];
    struct stat st;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", h->pid, h->fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd >= 0 && (fstat(fd, &st) || st.st_ino != h->serial)) { close(fd); fd = -1; }
    return fd;
}
int cuIpcGetMemHandle(struct handle64 *h, ptr_t at) {
    BEGIN; GUARD; IN_CONTEXT;
    struct part *p = part_at(at);
    if (!p || p->kind != PLAIN) return INVALID_VALUE;
    fill(h, p);
    return OK;
}
int cuIpcOpenMemHandle(ptr_t *out, struct handle64 h, unsigned flags) {
    BEGIN; UNSAFE; GUARD; IN_CONTEXT;
    if (h.magic != 0xFA4E || flags != 1) return INVALID_VALUE;
    if (h.pid == getpid()) return INVALID_CONTEXT; /* not in the process that made it */
    for (int i = 0; i < most_parts; i++)
        if (parts[i].size && parts[i].kind == OPENED && !memcmp(&parts[i].from, &h, sizeof h)) {
            parts[i].opens++;
            *out = parts[i].at;
            return OK;
        }
    int fd = open_there(&h);
    if (fd < 0) return INVALID_VALUE;
    struct part *p;
    *out = map_whole(new_phys(h.size, current, 0, fd), OPENED, &p);
    p->from = h;
    return OK;
}
int cuIpcCloseMemHandle(ptr_t at) { BEGIN; UNSAFE; GUARD; IN_CONTEXT; return forget(at, 1 << OPENED); }

/* pools: what is allocated from one that is shared can be taken by who has imported the pool */
struct poolprops { int type, handles; struct { int type, id; } location; void *security; size_t max; unsigned char rest[64]; };
int cuMemPoolCreate(struct pool **out, const struct poolprops *props) {
    BEGIN; UNSAFE; GUARD;
    struct pool *p = calloc(1, sizeof *p);
    p->device = props->location.id, p->shared = props->handles & 1, p->fd = memfd_create("fake-gpu-pool", MFD_CLOEXEC);
    *out = p;
    return OK;
}
int cuMemPoolDestroy(struct pool *p) { BEGIN; UNSAFE; GUARD; close(p->fd); free(p); return OK; }
int cuMemAllocFromPoolAsync(ptr_t *out, size_t size, struct pool *pool, void *stream) {
    (void)stream;
    BEGIN; GUARD; IN_CONTEXT;
    if (pool->imported) return NOT_SUPPORTED;
    struct part *p;
    *out = map_whole(new_phys(size, current, pool->shared, -1), POOLED, &p);
    p->pool = pool;
    return OK;
}
int cuMemAllocAsync(ptr_t *out, size_t size, void *stream) { /* from the default pool, which cannot be shared */
    static struct pool usual;
    return cuMemAllocFromPoolAsync(out, size, &usual, stream);
}
int cuMemPoolExportToShareableHandle(int *fd, struct pool *p, int kind, unsigned long long flags) {
    (void)flags;
    BEGIN; GUARD;
    if (kind != 1 || !p->shared) return NOT_SUPPORTED;
    *fd = fcntl(p->fd, F_DUPFD, 3);
    return OK;
}
int cuMemPoolImportFromShareableHandle(struct pool **out, void *fd, int kind, unsigned long long flags) {
    (void)flags;
    BEGIN; GUARD;
    char path[64], name[64] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", (int)(intptr_t)fd);
    if (kind != 1 || readlink(path, name, 63) < 0 || strncmp(name, "/memfd:fake-gpu-pool", 20)) return INVALID_VALUE;
    struct pool *p = calloc(1, sizeof *p);
    p->fd = fcntl((int)(intptr_t)fd, F_DUPFD_CLOEXEC, 3), p->imported = 1;
    *out = p;
    return OK;
}
int cuMemPoolExportPointer(struct handle64 *h, ptr_t at) {
    BEGIN; GUARD; IN_CONTEXT;
    struct part *p = part_at(at);
    if (!p || p->kind != POOLED || !p->pool->shared) return INVALID_VALUE;
    fill(h, p);
    return OK;
}
int cuMemPoolImportPointer(ptr_t *out, struct pool *pool, struct handle64 *h) {
    BEGIN; GUARD; IN_CONTEXT;
    if (!pool->imported || h->magic != 0xFA4E) return INVALID_VALUE;
    for (int i = 0; i < most_parts; i++)
        if (parts[i].size && parts[i].kind == TAKEN && !memcmp(&parts[i].from, h, sizeof *h)) return 208; /* ALREADY_MAPPED */
    int fd = open_there(h);
    if (fd < 0) return INVALID_VALUE;
    struct part *p;
    *out = map_whole(new_phys(h->size, current, 0, fd), TAKEN, &p);
    p->from = *h, p->pool = pool;
    return OK;
}

int cuPointerGetAttribute(void *out, int what, ptr_t at) {
    BEGIN; GUARD;
    struct part *p = part_at(at);
    if (!p) return INVALID_VALUE;
    switch (what) {
    case 2: *(int *)out = 2; return OK; /* MEMORY_TYPE: device */
    case 8: *(int *)out = p->kind == MANAGED && !broken("managed"); return OK; /* IS_MANAGED */
    case 9: *(int *)out = p->phys->device; return OK; /* DEVICE_ORDINAL */
    case 10: *(int *)out = p->kind == PLAIN || p->kind == OPENED || broken("managed"); return OK; /* IS_LEGACY_CUDA_IPC_CAPABLE */
    case 11: case 12: /* RANGE_START_ADDR, RANGE_SIZE: of what was reserved, where that is something else */
        for (int i = 0; i < most_reserved; i++)
            if (reserved[i].size && at >= reserved[i].at && at < reserved[i].at + reserved[i].size) {
                if (what == 11) *(ptr_t *)out = reserved[i].at; else *(size_t *)out = reserved[i].size;
                return OK;
            }
        if (what == 11) *(ptr_t *)out = p->at; else *(size_t *)out = p->phys->size;
        return OK;
    case 19: *(ptr_t *)out = p->at; return OK; /* MAPPING_BASE_ADDR */
    case 18: *(size_t *)out = p->phys->size; return OK; /* MAPPING_SIZE */
    case 14: *(unsigned long long *)out = p->phys->kinds; return OK; /* ALLOWED_HANDLE_TYPES */
    case 17: *(void **)out = p->kind == POOLED || p->kind == TAKEN ? (void *)p->pool : NULL; return OK; /* MEMPOOL_HANDLE */
    }
    return INVALID_VALUE;
}

/* --- events, and what streams do --- */


struct state { volatile unsigned long long recorded, completed, dead; };
struct event { struct state *state; int fd, shared, imported; struct stream *captured; };
struct copy2d { size_t sx, sy; int st; const void *sh; ptr_t sd; void *sa; size_t sp; size_t dx, dy; int dt; void *dh; ptr_t dd; void *da; size_t dp, width, height; };
struct op { int kind; struct state *state; unsigned long long number; void (*fn)(void *); void *data; struct copy2d copy; struct op *next; };
enum { RECORD = 1, WAIT, CALL, COPY, VALUE };
static int live_events, live_streams, thread_pid;

static int step(struct stream *s) { /* one operation, the lock held, which it may let go; 0: none can be done now */
    struct op *op = s->first;
    if (s->held || s->running || !op) return 0;
    if (op->kind == WAIT && op->state->completed < op->number) return 0;
    if (op->kind == VALUE && *(volatile unsigned *)op->data < op->number) return 0;
    if (op->kind == RECORD) op->state->completed = op->number;
    if (op->kind == COPY)
        for (size_t row = 0; row < op->copy.height; row++)
            memcpy((char *)op->copy.dd + row * op->copy.dp, (char *)op->copy.sd + row * op->copy.sp, op->copy.width);
    if (op->kind == CALL) {
        s->running = 1;
        pthread_mutex_unlock(&lock);
        op->fn(op->data);
        pthread_mutex_lock(&lock);
        s->running = 0;
    }
    s->first = op->next;
    if (!s->first) s->last = NULL;
    free(op);
    return 1;
}

static void *pump(void *unused) { /* the driver's own thread: host functions are called here */
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        int foreign;
    again:
        foreign = 0;
        for (struct stream **at = &streams, *s; (s = *at);) {
            if (step(s)) goto again; /* others may go on, or have changed */
            if (s->first) foreign = 1;
            if (s->gone && !s->first && !s->running) { *at = s->next; free(s); live_streams--; goto again; }
            at = &s->next;
        }
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 1000000;
        if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
        if (foreign) pthread_cond_timedwait(&changed, &lock, &until); /* another process may complete it */
        else pthread_cond_wait(&changed, &lock);
    }
    return NULL;
}

static void put(struct stream *s, struct op op) { /* the lock held */
    struct op *one = malloc(sizeof *one);
    *one = op;
    if (s->last) s->last->next = one; else s->first = one;
    s->last = one;
    if ((op.kind == RECORD || op.kind == COPY) && s->first == one) while (s->first && s->first->kind != CALL && step(s)) {}
}

static void push(struct stream *s, struct op op) {
    pthread_mutex_lock(&lock);
    if (s->blocking && !s->of_thread && !broken("default")) /* what is given to others of these so far comes first */
        for (struct stream *one = streams; one; one = one->next)
            if ((s == &usual) != (one == &usual) && one->blocking && !one->of_thread && (one->first || one->held)) {
                struct state *state = calloc(1, sizeof *state);
                put(one, (struct op){.kind = RECORD, .state = state, .number = 1});
                put(s, (struct op){.kind = WAIT, .state = state, .number = 1});
            }
    put(s, op);
    if (thread_pid != getpid()) {
        pthread_t t;
        thread_pid = getpid();
        pthread_create(&t, NULL, pump, NULL);
        pthread_detach(t);
    }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

int cuStreamCreate(struct stream **out, unsigned flags) {
    BEGIN; UNSAFE; IN_CONTEXT;
    struct stream *s = calloc(1, sizeof *s);
    s->blocking = !(flags & 1);
    pthread_mutex_lock(&lock);
    s->next = streams->next, streams->next = s, live_streams++;
    pthread_mutex_unlock(&lock);
    *out = s;
    return OK;
}
int cuStreamDestroy(struct stream *s) {
    BEGIN; IN_CONTEXT;
    if (stream_of(s) == &usual) return INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    s->gone = 1;
    if (!s->first && !s->running) {
        struct stream **at = &streams;
        while (*at != s) at = &(*at)->next;
        *at = s->next;
        free(s);
        live_streams--;
    }
    pthread_mutex_unlock(&lock);
    return OK;
}
static int busy(struct stream *only) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (struct stream *s = streams; s; s = s->next) found |= s->first && (!only || s == only);
    pthread_mutex_unlock(&lock);
    return found;
}
int cuStreamSynchronize(struct stream *s) { BEGIN; IN_CONTEXT; NOT_CAPTURED(s); while (busy(stream_of(s))) usleep(500); return OK; }
int cuCtxSynchronize(void) { BEGIN; IN_CONTEXT; int s = conflict(ALL, CAPTURE_UNSUPPORTED); if (s) return s; while (busy(NULL)) usleep(500); return OK; }
int cuStreamIsCapturing(struct stream *s, int *out) { /* spoils nothing */
    BEGIN; IN_CONTEXT;
    pthread_mutex_lock(&lock);
    int implied = 0;
    for (struct stream *one = streams; one; one = one->next) implied |= one->capture && one->blocking;
    pthread_mutex_unlock(&lock);
    s = stream_of(s);
    *out = s->capture ? 1 + s->spoiled : 0;
    return s == &usual && implied ? CAPTURE_IMPLICIT : OK;
}
int cuStreamBeginCapture(struct stream *s, int mode) {
    BEGIN; IN_CONTEXT;
    s = stream_of(s);
    if (s == &usual || s->capture) return CAPTURE_UNSUPPORTED;
    s->capture = 1, s->mode = mode, s->owner = (int)syscall(SYS_gettid), s->spoiled = 0;
    return OK;
}
int cuStreamEndCapture(struct stream *s, void **graph) {
    BEGIN; IN_CONTEXT;
    s = stream_of(s);
    if (!s->capture) return CAPTURE_UNMATCHED;
    s->capture = 0;
    *graph = s->spoiled ? NULL : (void *)1;
    return s->spoiled ? CAPTURE_INVALIDATED : OK;
}
int cuMemsetD32Async(ptr_t at, unsigned value, size_t n, struct stream *s) {
    BEGIN; IN_CONTEXT; NOT_CAPTURED(s);
    static unsigned values[4];
    if (value || n > 4) return NOT_SUPPORTED;
    push(stream_of(s), (struct op){.kind = COPY, .copy = {.sd = (ptr_t)values, .dd = at, .width = 4 * n, .height = 1}});
    return OK;
}
int cuMemcpy2DAsync(const struct copy2d *c, struct stream *s) {
    BEGIN; IN_CONTEXT; NOT_CAPTURED(s);
    if (c->st != 4 || c->dt != 4) return INVALID_VALUE; /* CU_MEMORYTYPE_UNIFIED */
    if (c->sp < c->width || c->dp < c->width) return INVALID_VALUE;
    push(stream_of(s), (struct op){.kind = COPY, .copy = *c});
    return OK;
}
int cuMemcpyAsync(ptr_t to, ptr_t from, size_t n, struct stream *s) {
    BEGIN; IN_CONTEXT; NOT_CAPTURED(s);
    push(stream_of(s), (struct op){.kind = COPY, .copy = {.sd = from, .dd = to, .width = n, .height = 1}});
    return OK;
}
int cuMemcpy(ptr_t to, ptr_t from, size_t n) { /* in the default stream, and waited for */
    BEGIN; UNSAFE;
    int s = cuMemcpyAsync(to, from, n, NULL);
    return s ? s : cuStreamSynchronize(NULL);
}
int cuStreamQuery(struct stream *s) { BEGIN; IN_CONTEXT; NOT_CAPTURED(s); return stream_of(s)->first ? NOT_READY : OK; }
void fakeIdle(void) { /* wait until no stream has anything left to do, and those that were destroyed are gone */
    pthread_mutex_lock(&lock);
again:
    for (struct stream *s = streams; s; s = s->next)
        if (!s->held && (s->first || s->gone)) {
            pthread_cond_broadcast(&changed);
            pthread_mutex_unlock(&lock);
            usleep(500);
            pthread_mutex_lock(&lock);
            goto again;
        }
    pthread_mutex_unlock(&lock);
}
void fakeHold(void *s) { s = stream_of(s); pthread_mutex_lock(&lock); ((struct stream *)s)->held = 1; pthread_mutex_unlock(&lock); }
void fakeGo(void *s) { s = stream_of(s); pthread_mutex_lock(&lock); ((struct stream *)s)->held = 0; pthread_cond_broadcast(&changed); pthread_mutex_unlock(&lock); }

void *fakeMine(void) { return stream_of((void *)2); } /* what handle 2 is in this thread, for others */
int fakePrimary(int device) { return primary[device]; }
void fakeRelease(void) { /* nothing is held, and nothing captured */
    pthread_mutex_lock(&lock);
    for (struct stream *s = streams; s; s = s->next) s->held = s->capture = 0;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

int cuEventCreate(struct event **out, unsigned flags) {
    BEGIN; UNSAFE; IN_CONTEXT;
    if (flags & 4 && !(flags & 2)) return INVALID_VALUE; /* between processes there is no timing */
    struct event *e = calloc(1, sizeof *e);
    e->fd = -1;
    if (flags & 4) {
        e->shared = 1;
        e->fd = memfd_create("fake-gpu-event", MFD_CLOEXEC);
        if (ftruncate(e->fd, 4096)) abort();
        e->state = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, e->fd, 0);
    } else e->state = calloc(1, sizeof *e->state);
    live_events++;
    *out = e;
    return OK;
}
int cuEventDestroy(struct event *e) {
    BEGIN; IN_CONTEXT;
    if (e->shared || e->imported) {
        if (e->shared) e->state->dead = 1;
        pthread_mutex_lock(&lock); /* what is still to be done with it is nothing now */
        for (struct stream *s = streams; s; s = s->next)
            for (struct op *op = s->first; op; op = op->next)
                if (op->state == e->state) op->kind = 0;
        pthread_mutex_unlock(&lock);
        munmap((void *)e->state, 4096);
        close(e->fd);
        free(e);
    } /* the state of others may still be looked at by a stream: it stays */
    live_events--;
    return OK;
}
int cuEventRecord(struct event *e, void *s) {
    BEGIN; IN_CONTEXT; LEGACY(s);
    if (e->state->dead) return INVALID_HANDLE;
    e->captured = stream_of(s)->capture ? stream_of(s) : NULL;
    if (e->captured) return OK;
    push(stream_of(s), (struct op){.kind = RECORD, .state = e->state, .number = ++e->state->recorded});
    return OK;
}
#define NOT_IN_CAPTURE(e) do { if ((e)->captured) { (e)->captured->spoiled = 1; return CAPTURED_EVENT; } } while (0)
int cuEventQuery(struct event *e) { BEGIN; UNSAFE; IN_CONTEXT; NOT_IN_CAPTURE(e); if (broken("events")) return OK; return e->state->dead ? INVALID_HANDLE : e->state->completed < e->state->recorded ? NOT_READY : OK; }
int cuEventSynchronize(struct event *e) {
    BEGIN; UNSAFE; IN_CONTEXT; NOT_IN_CAPTURE(e);
    while (e->state->completed < e->state->recorded) usleep(500);
    return OK;
}
int cuStreamWaitEvent(void *s, struct event *e, unsigned flags) {
    (void)flags;
    BEGIN; IN_CONTEXT; NOT_CAPTURED(s); NOT_IN_CAPTURE(e);
    if (e->state->dead) return INVALID_HANDLE;
    if (broken("events")) return OK;
    push(stream_of(s), (struct op){.kind = WAIT, .state = e->state, .number = e->state->recorded});
    return OK;
}
int cuStreamWaitValue32(void *s, ptr_t at, unsigned value, unsigned flags) { /* until it is that large */
    BEGIN; IN_CONTEXT; NOT_CAPTURED(s);
    if (flags) return NOT_SUPPORTED;
    push(stream_of(s), (struct op){.kind = VALUE, .data = (void *)at, .number = value});
    return OK;
}
int cuStreamWriteValue32(void *s, ptr_t at, unsigned value, unsigned flags) {
    BEGIN; IN_CONTEXT; NOT_CAPTURED(s);
    (void)flags;
    pthread_mutex_lock(&lock);
    *(volatile unsigned *)at = value; /* at once, whatever is in the stream */
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return OK;
}
int cuLaunchHostFunc(void *s, void (*fn)(void *), void *data) {
    BEGIN; IN_CONTEXT; NOT_CAPTURED(s);
    push(stream_of(s), (struct op){.kind = CALL, .fn = fn, .data = data});
    return OK;
}
int cuIpcGetEventHandle(struct handle64 *h, struct event *e) {
    BEGIN; IN_CONTEXT;
    if (!e->shared) return INVALID_HANDLE;
    memset(h, 0, sizeof *h);
    struct stat st;
    fstat(e->fd, &st);
    h->magic = 0xFA4E, h->pid = getpid(), h->fd = e->fd, h->serial = st.st_ino;
    return OK;
}
int cuIpcOpenEventHandle(struct event **out, struct handle64 h) {
    BEGIN; IN_CONTEXT;
    if (h.pid == getpid()) return INVALID_CONTEXT;
    int fd = open_there(&h);
    if (fd < 0) return INVALID_HANDLE;
    struct event *e = calloc(1, sizeof *e);
    e->imported = 1, e->fd = fd;
    e->state = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    live_events++;
    *out = e;
    return OK;
}

/* --- what is still there, and the way in --- */

int fakeLive(const char *what) {
    int n = 0;
    if (!strcmp(what, "memory")) return live_phys;
    if (!strcmp(what, "scratch")) return live_scratch;
    if (!strcmp(what, "events")) return live_events;
    if (!strcmp(what, "streams")) return live_streams;
    if (!strcmp(what, "contexts")) { for (int i = 0; i < 16; i++) n += primary[i]; return n; }
    if (!strcmp(what, "mapped")) { for (int i = 0; i < most_parts; i++) n += parts[i].size != 0; return n; }
    if (!strcmp(what, "reserved")) { for (int i = 0; i < most_reserved; i++) n += reserved[i].size != 0; return n; }
    return -1;
}

int cuGetProcAddress_v2(const char *name, void **out, int version, unsigned long long flags, int *status) {
    (void)flags;
    const char *missing = getenv("FAKE_CUDA_MISSING");
    static void *self;
    if (!self) {
        Dl_info info;
        dladdr((void *)cuInit, &info);
        self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    }
    *out = version > 13000 || (missing && strstr(missing, name)) ? NULL : dlsym(self, name);
    if (status) *status = *out ? 0 : 1;
    return *out ? OK : NOT_FOUND;
}
int cuGetProcAddress(const char *name, void **out, int version, unsigned long long flags, int *status) {
    return cuGetProcAddress_v2(name, out, version, flags, status);
}

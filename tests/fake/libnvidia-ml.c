/* A stand-in for NVIDIA's management library, for tests on machines without a GPU: two GPUs, the second one divided.
   The layouts are those of nvml.h. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { int number; } device;
static device devices[] = {{0}, {1}}, instances[] = {{10}, {11}};
static int begun;
enum { OK = 0, UNINITIALIZED = 1, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9,
       GPU_IS_LOST = 15 };

static int number(const char *name, int other) {
    const char *text = getenv(name);
    return text && *text ? atoi(text) : other;
}

int nvmlInit_v2(void) {
    int status = number("FAKE_NVML_STATUS", OK);
    if (!status) begun++;
    return status;
}
int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
int nvmlShutdown(void) { if (!begun) return UNINITIALIZED; begun--; return OK; }
int fakeBegun(void) { return begun; }
const char *nvmlErrorString(int status) {
    return status == DRIVER_NOT_LOADED ? "Driver Not Loaded" : status == GPU_IS_LOST ? "GPU is lost" : "as the test has ordered";
}

int nvmlDeviceGetCount_v2(unsigned *n) { if (!begun) return UNINITIALIZED; *n = number("FAKE_NVML_DEVICES", 2); return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, device **out) {
    *out = &devices[i];
    return number("FAKE_NVML_LOST", -1) == (int)i ? GPU_IS_LOST : OK;
}
int nvmlDeviceGetUUID(device *d, char *out, unsigned room) {
    if (room < 80) return INSUFFICIENT_SIZE;
    int n = 0x11 * (d->number % 10 + 1) + (d->number < 10 ? 0 : 0x90); /* as the fake driver of CUDA has them */
    sprintf(out, "%s-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", d->number < 10 ? "GPU" : "MIG",
            n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n);
    return OK;
}
int nvmlDeviceGetName(device *d, char *out, unsigned room) { snprintf(out, room, "Fake GPU %d", d->number); return OK; }

struct memory { unsigned version; unsigned long long total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo_v2(device *d, struct memory *m) {
    if (d->number == number("FAKE_NVML_DENIED", -1)) return NO_PERMISSION; /* to the whole of a divided one */
    m->total = 80ull << 30, m->reserved = 1ull << 30, m->used = (1ull + d->number) << 30, m->free = m->total - m->used;
    return OK;
}
int nvmlDeviceGetMigMode(device *d, unsigned *now, unsigned *next) {
    if (d->number == 0) return NOT_SUPPORTED;
    *now = *next = 1;
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(device *d, unsigned *n) { (void)d; *n = 3; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(device *d, unsigned i, device **out) {
    (void)d;
    if (i == 1) return NOT_FOUND; /* nothing is in this place */
    *out = &instances[i / 2];
    return OK;
}
struct process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };
int nvmlDeviceGetComputeRunningProcesses_v3(device *d, unsigned *n, struct process *out) {
    if (d->number == number("FAKE_NVML_DENIED", 1)) return NO_PERMISSION;
    if (d->number >= 10) { /* an instance */
        if (*n < 1) { *n = 1; return INSUFFICIENT_SIZE; }
        *n = 1;
        out[0] = (struct process){40 + d->number, 1 << 20, 0, 0};
        return OK;
    }
    if (*n < 2) { *n = 2; return INSUFFICIENT_SIZE; }
    *n = 2;
    out[0] = (struct process){getpid(), 5 << 20, -1, -1};
    const char *path = getenv("FAKE_NVML_PID_FILE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (file) {
        if (fscanf(file, "%u", &out[0].pid) != 1) out[0].pid = 0;
        fclose(file);
    }
    out[1] = (struct process){1, -1ull, -1, -1}; /* NVML_VALUE_NOT_AVAILABLE */
    return OK;
}

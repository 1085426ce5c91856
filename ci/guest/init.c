/*
 * The first process of a guest machine. It runs the commands listed in /command, one after the other, hands their output
 * to the outside, says how each one ended, and switches the machine off.
 *
 * /command is a sequence of strings, each closed by a zero byte:
 *     D<directory>  where the commands run        V<NAME=value>  an environment variable
 *     A<argument>   one argument of a command      R              run what the arguments before it say
 *
 * What it sends outside is a sequence of records. A record is one letter, four hexadecimal digits and a space, then as many
 * bytes as the digits say, then a line feed:
 *     b  the machine has started (seconds)          o, e  bytes of standard output, standard error
 *     x  the command ended with this status         s     the command died of this signal
 *     q  everything has run
 * Each record begins with the byte 0x02, so that a reader finds its place again after a word from the kernel.
 *
 * arm64 sends over the console, x86-64 through port 0xe9 of the emulator.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#ifdef __x86_64__
#include <sys/io.h>

static void open_outside(void) { ioperm(0xe9, 1, 1); ioperm(0x8900, 1, 1); }
static void send_bytes(const char *bytes, size_t count) { while (count--) outb(*bytes++, 0xe9); }
static void switch_off(void) {
    for (const char *word = "Shutdown"; *word; word++) outb(*word, 0x8900);
    for (;;) pause();
}
#else
static int outside;

static void open_outside(void) {
    struct termios raw;
    outside = open("/dev/console", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (tcgetattr(outside, &raw) == 0) { cfmakeraw(&raw); tcsetattr(outside, TCSANOW, &raw); }
}
static void send_bytes(const char *bytes, size_t count) {
    while (count) {
        ssize_t sent = write(outside, bytes, count);
        if (sent < 0) { if (errno == EINTR || errno == EAGAIN) continue; return; }
        bytes += sent;
        count -= sent;
    }
}
static void switch_off(void) {
    tcdrain(outside);
    reboot(RB_POWER_OFF);
    for (;;) pause();
}
#endif

static void send_record(char kind, const char *bytes, size_t count) {
    char head[16];
    int length = snprintf(head, sizeof head, "\002%c%04zx ", kind, count);
    send_bytes(head, length);
    send_bytes(bytes, count);
    send_bytes("\n", 1);
}

static void send_number(char kind, int number) {
    char text[16];
    send_record(kind, text, snprintf(text, sizeof text, "%d", number));
}

static void set_kernel(const char *path, const char *value) {
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file >= 0) { if (write(file, value, strlen(value)) < 0) { /* an older kernel without it */ } close(file); }
}

/* Copies one pipe's readable bytes outside; closes it at its end. */
static void forward(struct pollfd *from, char kind) {
    char bytes[16384];
    if (!from->revents) return;
    ssize_t count = read(from->fd, bytes, sizeof bytes);
    if (count > 0) { send_record(kind, bytes, count); return; }
    if (count < 0 && errno == EINTR) return;
    close(from->fd);
    from->fd = -1;
}

static void run(char **arguments, const char *directory) {
    int out[2], err[2], status;
    if (pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC)) { send_number('x', 126); return; }
    pid_t child = fork();
    if (child == 0) {
        struct rlimit none = {0, 0};
        setrlimit(RLIMIT_CORE, &none);
        setsid();
        dup2(open("/dev/null", O_RDONLY), 0);
        dup2(out[1], 1);
        dup2(err[1], 2);
        if (chdir(directory)) { perror(directory); _exit(126); }
        execv(arguments[0], arguments);
        perror(arguments[0]);
        _exit(127);
    }
    close(out[1]);
    close(err[1]);
    struct pollfd from[2] = {{out[0], POLLIN, 0}, {err[0], POLLIN, 0}};
    /* A grandchild may keep the pipes open after the command has ended: its end decides. */
    int ended = 0;
    while (from[0].fd >= 0 || from[1].fd >= 0) {
        int ready = poll(from, 2, ended ? 0 : 100);
        if (ready > 0) { forward(&from[0], 'o'); forward(&from[1], 'e'); }
        else if (ended) break;
        if (!ended && waitpid(child, &status, WNOHANG) == child) ended = 1;
    }
    for (int i = 0; i < 2; i++) if (from[i].fd >= 0) close(from[i].fd);
    while (!ended && waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    kill(-child, SIGKILL);
    while (waitpid(-1, NULL, WNOHANG) > 0) {}
    if (WIFSIGNALED(status)) send_number('s', WTERMSIG(status));
    else send_number('x', WEXITSTATUS(status));
}

int main(void) {
    static char commands[1 << 20];
    char *arguments[1024], uptime[64] = "";
    const char *directory = "/";
    int count = 0;

    mount("proc", "/proc", "proc", 0, 0);
    mount("sysfs", "/sys", "sysfs", 0, 0);
    mount("dev", "/dev", "devtmpfs", 0, 0);
    mkdir("/dev/shm", 01777);
    mount("shm", "/dev/shm", "tmpfs", 0, "mode=1777");
    open_outside();
    klogctl(6, NULL, 0); /* the kernel's log stays off the console */
    set_kernel("/proc/sys/kernel/print-fatal-signals", "0");
    set_kernel("/proc/sys/debug/exception-trace", "0");
    setenv("HOME", "/tmp", 1);
    setenv("TMPDIR", "/tmp", 1);
    setenv("PATH", "/bin", 1);

    int file = open("/proc/uptime", O_RDONLY | O_CLOEXEC);
    ssize_t length = read(file, uptime, sizeof uptime - 1);
    close(file);
    send_record('b', uptime, strcspn(uptime, " "));
    (void)length;

    file = open("/command", O_RDONLY | O_CLOEXEC);
    size_t filled = 0;
    for (ssize_t more; filled < sizeof commands - 1 && (more = read(file, commands + filled, sizeof commands - 1 - filled)) > 0;)
        filled += more;
    close(file);

    for (char *word = commands; word < commands + filled; word += strlen(word) + 1) {
        switch (*word) {
        case 'D': directory = word + 1; break;
        case 'V': putenv(word + 1); break;
        case 'A': if (count < 1023) arguments[count++] = word + 1; break;
        case 'R': arguments[count] = NULL; if (count) run(arguments, directory); count = 0; break;
        }
    }
    send_record('q', "", 0);
    switch_off();
}

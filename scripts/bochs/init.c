// The first and only process of the emulated machine: runs /test, says how it ended, and stops
// Bochs.
#include <fcntl.h>
#include <stdio.h>
#include <sys/io.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void) {
  const int serial = open("/dev/ttyS0", O_RDWR);
  int status = 0;
  for (int i = 0; i < 3; i++) dup2(serial, i);
  if (fork() == 0) {
    execl("/test", "/test", (char*)0);
    _exit(127);
  }
  wait(&status);
  printf("\n@status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  fflush(stdout);
  fsync(1);
  usleep(100000);
  iopl(3);
  for (const char* p = "Shutdown"; *p; p++) outb(*p, 0x8900);  // Bochs's own port
  for (;;) pause();
}

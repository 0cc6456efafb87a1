// probe: what the lab itself does, independent of the engine.
//   probe exchange BYTES REPEATS   all-to-all of BYTES from every rank to every other, contents checked
//   probe compute SECONDS          multiply-adds for SECONDS of this rank's CPU time, all ranks at once
// Rank 0 prints one line of JSON: seconds of the exchanges (slowest rank each) and bytes that were wrong, or the wall and CPU
// seconds of every rank.
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double cpu_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void exchange(int rank, int ranks, int bytes, int repeats) {
  char *out = malloc((size_t)ranks * bytes), *in = malloc((size_t)ranks * bytes);
  double *seconds = malloc(repeats * sizeof *seconds);
  for (int to = 0; to < ranks; to++) memset(out + (size_t)to * bytes, rank * 16 + to, bytes);
  memset(in, 255, (size_t)ranks * bytes);
  MPI_Request *request = malloc(2 * ranks * sizeof *request);
  for (int i = -1; i < repeats; i++) { // the first one warms up
    MPI_Barrier(MPI_COMM_WORLD);
    double start = MPI_Wtime();
    int n = 0;
    for (int step = 1; step < ranks; step++) {
      int to = (rank + step) % ranks, from = (rank + ranks - step) % ranks;
      MPI_Irecv(in + (size_t)from * bytes, bytes, MPI_BYTE, from, 1, MPI_COMM_WORLD, &request[n++]);
      MPI_Isend(out + (size_t)to * bytes, bytes, MPI_BYTE, to, 1, MPI_COMM_WORLD, &request[n++]);
    }
    // Polls with short sleeps: MPI's own waits would burn the cores that move the packets.
    for (int done = 0; !done;) {
      MPI_Testall(n, request, &done, MPI_STATUSES_IGNORE);
      if (!done) nanosleep(&(struct timespec){0, 200000}, 0);
    }
    double mine = MPI_Wtime() - start, slowest;
    MPI_Allreduce(&mine, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    if (i >= 0) seconds[i] = slowest;
  }
  long wrong = 0, all = 0;
  for (int from = 0; from < ranks; from++)
    for (int i = 0; from != rank && i < bytes; i++) wrong += in[(size_t)from * bytes + i] != (char)(from * 16 + rank);
  MPI_Reduce(&wrong, &all, 1, MPI_LONG, MPI_SUM, 0, MPI_COMM_WORLD);
  if (rank) return;
  qsort(seconds, repeats, sizeof *seconds, ascending);
  printf("{\"median_seconds\": %.6f, \"min_seconds\": %.6f, \"wrong_bytes\": %ld}\n", seconds[repeats / 2], seconds[0], all);
}

static void compute(int rank, int ranks, double seconds) {
  volatile float sink;
  float a[64];
  for (int i = 0; i < 64; i++) a[i] = i;
  MPI_Barrier(MPI_COMM_WORLD);
  double start = MPI_Wtime(), begin = cpu_seconds();
  while (cpu_seconds() - begin < seconds)
    for (int k = 0; k < 20000; k++)
      for (int i = 0; i < 64; i++) a[i] = a[i] * 0.999f + 1e-7f;
  double mine[2] = {MPI_Wtime() - start, cpu_seconds() - begin}, *all = malloc(ranks * sizeof mine);
  sink = a[rank % 64];
  (void)sink;
  MPI_Request request; // polls: who is done early must not burn its neighbours' cores
  MPI_Igather(mine, 2, MPI_DOUBLE, all, 2, MPI_DOUBLE, 0, MPI_COMM_WORLD, &request);
  for (int done = 0; !done;) {
    MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (!done) nanosleep(&(struct timespec){0, 1000000}, 0);
  }
  if (rank) return;
  printf("{\"ranks\": [");
  for (int i = 0; i < ranks; i++) printf("%s[%.6f, %.6f]", i ? ", " : "", all[2 * i], all[2 * i + 1]);
  printf("]}\n");
}

int main(int argc, char **argv) {
  int rank, ranks;
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  if (argc == 4 && !strcmp(argv[1], "exchange")) exchange(rank, ranks, atoi(argv[2]), atoi(argv[3]));
  else if (argc == 3 && !strcmp(argv[1], "compute")) compute(rank, ranks, atof(argv[2]));
  else if (!rank) fprintf(stderr, "probe exchange BYTES REPEATS | probe compute SECONDS\n");
  MPI_Finalize();
  return 0;
}

"""What `run` and `faults` share: the lab, control groups for the ranks, the programs."""
import contextlib, json, os, pathlib, shlex, shutil, signal, subprocess, sys, tempfile, time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Cores that all ranks together may compute with; the rest moves packets. On a machine of two cores.
COMPUTE_CORES = 0.8 * min(2, os.cpu_count() or 1)
PERIOD_US = 10_000
# Share of a link that is left for payload under TCP, IP and Ethernet headers at 1,500 bytes.
PAYLOAD = 0.956


def sh(*command, **options):
    return subprocess.run([str(c) for c in command], check=True, text=True, **options)


def install():
    """Debian's packages, where something is missing."""
    wanted = {
        'ip': 'iproute2', 'nft': 'nftables', 'mpicc.openmpi': 'libopenmpi-dev', 'mpirun.openmpi': 'openmpi-bin',
        'mpicc.mpich': 'libmpich-dev', 'mpiexec.mpich': 'mpich', 'nsenter': 'util-linux', 'gcc': 'gcc',
    }
    missing = [package for program, package in wanted.items() if not shutil.which(program)]
    if not list(pathlib.Path('/usr/lib').glob('llvm-*/lib/libclang.so')):
        missing.append('libclang-dev')
    if missing:
        sh('apt-get', 'update', '-qq')
        sh('apt-get', 'install', '-y', '-qq', *missing, stdout=subprocess.DEVNULL)
    if os.geteuid() != 0:
        sys.exit('the lab needs root')


def build(mpi):
    """The engine for one of the two MPIs: OCCULT_BIN (OCCULT_BIN_MPICH), or built here."""
    given = os.environ.get('OCCULT_BIN' if mpi == 'openmpi' else 'OCCULT_BIN_MPICH')
    if given:
        return given
    target = pathlib.Path(os.environ.get('CARGO_TARGET_DIR', ROOT / 'target'))
    if mpi == 'mpich':
        target = target / 'mpich'
    environment = dict(os.environ, MPICC=f'mpicc.{mpi}', CARGO_TARGET_DIR=str(target))
    sh('cargo', 'build', '--release', '-p', 'occult-cli', '--features', 'mpi', cwd=ROOT, env=environment)
    return str(target / 'release' / 'occult')


def probe():
    path = pathlib.Path(tempfile.gettempdir()) / f'occult-probe-{os.getuid()}'
    sh('mpicc.openmpi', '-O2', '-march=native', HERE / 'probe.c', '-o', path)
    return str(path)


class Groups:
    """A control group per rank, by either kind of control groups, with a share of the cores."""

    def __init__(self, ranks, period_us=PERIOD_US):
        self.period_us = period_us
        old = pathlib.Path('/sys/fs/cgroup/cpu')
        self.old = (old / 'cpu.cfs_quota_us').exists() or old.is_dir()
        self.path = (old if self.old else pathlib.Path('/sys/fs/cgroup')) / 'occult-lab'
        self.path.mkdir(exist_ok=True)
        if not self.old:
            (self.path.parent / 'cgroup.subtree_control').write_text('+cpu')
            (self.path / 'cgroup.subtree_control').write_text('+cpu')
        self.ranks = ranks
        for rank in range(ranks):
            (self.path / f'rank{rank}').mkdir(exist_ok=True)
            self.limit(rank, COMPUTE_CORES / ranks)

    def limit(self, rank, cores):
        group, quota = self.path / f'rank{rank}', max(1000, int(cores * self.period_us))
        if self.old:
            (group / 'cpu.cfs_quota_us').write_text('-1')
            (group / 'cpu.cfs_period_us').write_text(str(self.period_us))
            (group / 'cpu.cfs_quota_us').write_text(str(quota))
        else:
            (group / 'cpu.max').write_text(f'{quota} {self.period_us}')

    def pids(self, rank):
        return [int(p) for p in (self.path / f'rank{rank}' / 'cgroup.procs').read_text().split()]

    def cpu_seconds(self):
        """Of all processes that are in them now."""
        fields = [pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split() for rank in range(self.ranks) for pid in self.pids(rank)]
        return sum(int(user) + int(system) for user, system in (f[11:13] for f in fields)) / os.sysconf('SC_CLK_TCK')

    def remove(self):
        """Ends what is left in them (of a job that hung) and removes them."""
        # Also those of a lab with more ranks that was killed.
        for group in self.path.glob('rank*'):
            rank = int(group.name.removeprefix('rank'))
            for pid in self.pids(rank):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for _ in range(100):
                if not self.pids(rank):
                    break
                time.sleep(0.05)
            group.rmdir()
        self.path.rmdir()


class Lab:
    """Hosts with one rank each or several, up as long as the `with` lasts. `rate`: Mbit/s of a host's link. `short`: the
    shortest periods in which a rank can have its share of the cores."""

    def __init__(self, ranks, rate, ranks_per_host=1, short=False):
        self.ranks, self.rate, self.hosts = ranks, rate, ranks // ranks_per_host
        self.period_us = int(1000 * max(1, ranks / COMPUTE_CORES)) if short else PERIOD_US

    def remote(self):
        """Messages of an all-to-all over one host's link."""
        per_host = self.ranks // self.hosts
        return per_host * (self.ranks - per_host)

    def __enter__(self):
        self.net('down')
        self.groups = Groups(self.ranks, self.period_us)
        self.net('up', self.hosts, f'{self.rate:.1f}mbit' if self.rate else 'none')
        return self

    def __exit__(self, *_):
        self.net('down')
        self.groups.remove()

    def net(self, *arguments):
        return sh(HERE / 'netlab', *arguments, stdout=subprocess.PIPE).stdout

    def sent(self):
        """Bytes that left every host, by its interface."""
        return [int(line.split()[1]) for line in self.net('bytes').splitlines()]

    def command(self, program, mpi='openmpi', environment=()):
        """The shell command of a program with one rank per host, each in its control group."""
        settings = [f'RANK_OUTSIDE={os.getpid()}', f'RANK_GROUP={self.groups.path}', *environment]
        # Ranks of one host talk through its memory.
        memory = ['env', 'BTL=vader,tcp,self'] if self.hosts < self.ranks else []
        words = [*memory, HERE / 'launch', mpi, self.hosts, self.ranks // self.hosts]
        for setting in settings:
            words += ['-x', setting]
        return shlex.join(str(w) for w in [*words, HERE / 'rank', *program])


def last_json(text):
    """The JSON object that a program printed, whatever its launcher said before."""
    start = text.find('{')
    if start < 0:
        raise ValueError(f'no JSON in {text[-2000:]!r}')
    return json.JSONDecoder().raw_decode(text[start:])[0]

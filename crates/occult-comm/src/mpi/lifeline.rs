//! TCP connections between all processes on which nothing is said: the system closes them when a process ends. MPI notices
//! that late, or holds a call for ever.
//!
//! Only a help: where processes cannot reach each other this way, or whole hosts fail, the deadlines of waits remain.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::Builder;
use std::time::Duration;

/// Longest time in which a connection is made or its token read.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// Most connections that are accepted: other processes need one each, and strangers may come.
const ACCEPTED: usize = 4096;
/// Threads that only wait need next to no stack.
const STACK_BYTES: usize = 64 * 1024;

/// A process that others can watch.
#[derive(Debug)]
pub(super) struct Lifeline {
    listener: TcpListener,
    token: u64,
}

/// What others must know to watch a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Contact {
    /// What it says to those who connect: an address may be that of another process.
    token: u64,
    addresses: Vec<SocketAddr>,
}

impl Contact {
    /// As one line of text.
    pub(super) fn encode(&self) -> String {
        let words = self.addresses.iter().map(ToString::to_string);
        std::iter::once(self.token.to_string()).chain(words).collect::<Vec<_>>().join(" ")
    }

    pub(super) fn decode(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let token = words.next()?.parse().ok()?;
        Some(Self { token, addresses: words.map(str::parse).collect::<Result<_, _>>().ok()? })
    }

    fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&address, CONNECT_LIMIT)?;
        stream.set_read_timeout(Some(CONNECT_LIMIT))?;
        let mut token = [0; 8];
        stream.read_exact(&mut token)?;
        if token != self.token.to_le_bytes() {
            return Err(ErrorKind::ConnectionRefused.into());
        }
        stream.set_read_timeout(None)?;
        Ok(stream)
    }

    /// Returns when the process has ended; `false` when that cannot be told (any more).
    fn wait_for_end(&self) -> bool {
        let Some(mut stream) = self.addresses.iter().find_map(|&address| self.connect(address).ok()) else {
            return false;
        };
        // Nobody writes: this returns when the connection ends.
        loop {
            match stream.read(&mut [0; 8]) {
                // Closed in good order: its system does that for a process that ends, never while it lives.
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Broken by something between the processes.
                Err(_) => return false,
            }
        }
    }
}

impl Lifeline {
    /// Begins to listen, on every interface.
    pub(super) fn open() -> io::Result<Self> {
        use std::hash::{BuildHasher as _, Hasher as _};
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let token = std::collections::hash_map::RandomState::new().build_hasher().finish();
        Ok(Self { listener, token })
    }

    /// How to reach this process.
    pub(super) fn contact(&self) -> io::Result<Contact> {
        let port = self.listener.local_addr()?.port();
        let ips = if_addrs::get_if_addrs()?.into_iter().map(|interface| interface.ip());
        let addresses = ips.filter(|ip| ip.is_ipv4()).map(|ip| SocketAddr::new(ip, port)).collect();
        Ok(Contact { token: self.token, addresses })
    }

    /// Lets others hold on to this process, as long as it lives, in threads of its own; and calls `over` with the rank of each of
    /// `others` that ends, `true`, or that can no longer be watched, `false`.
    pub(super) fn hold(
        self,
        others: Vec<(usize, Contact)>,
        over: impl Fn(usize, bool) + Send + Sync + 'static,
    ) -> io::Result<()> {
        let thread = || Builder::new().name("mpi-lifeline".into()).stack_size(STACK_BYTES);
        thread().spawn(move || {
            let mut held = Vec::new();
            for stream in self.listener.incoming() {
                match stream {
                    Ok(mut stream) if held.len() < ACCEPTED => {
                        if stream.write_all(&self.token.to_le_bytes()).is_ok() {
                            held.push(stream);
                        }
                    }
                    // Too many connections here, or open files in this process.
                    _ => std::thread::sleep(CONNECT_LIMIT),
                }
            }
        })?;
        let over = Arc::new(over);
        for (rank, contact) in others {
            let over = Arc::clone(&over);
            thread().spawn(move || over(rank, contact.wait_for_end()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_contact_is_a_line() {
        let addresses =
            vec!["127.0.0.1:80".parse().expect("an address"), "10.0.0.7:9".parse().expect("an address")];
        for addresses in [addresses, Vec::new()] {
            let contact = Contact { token: u64::MAX, addresses };
            assert_eq!(Contact::decode(&contact.encode()), Some(contact));
        }
        for wrong in ["", "x", "1 2", "1 127.0.0.1", "1  "] {
            assert_eq!(Contact::decode(wrong), None, "{wrong:?}");
        }
    }

    /// A process as the others see it, whose connections a test can break.
    fn process(token: u64) -> (TcpListener, Contact) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        (listener, Contact { token, addresses: vec![address] })
    }

    fn accept(listener: &TcpListener, token: u64) -> TcpStream {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.write_all(&token.to_le_bytes()).expect("a token");
        stream
    }

    #[test]
    fn the_end_of_a_process_is_noticed() {
        let (listener, contact) = process(7);
        let watcher = std::thread::spawn(move || contact.wait_for_end());
        let held = accept(&listener, 7);
        assert!(!watcher.is_finished());
        drop(held);
        assert!(watcher.join().expect("no panic"));
    }

    #[test]
    fn another_process_is_not_watched() {
        let (listener, contact) = process(7);
        let watcher = std::thread::spawn(move || contact.wait_for_end());
        drop(accept(&listener, 8));
        assert!(!watcher.join().expect("no panic"));
    }

    #[test]
    fn a_process_is_reached_at_each_of_its_addresses() {
        let line = Lifeline::open().expect("a port");
        let contact = line.contact().expect("addresses");
        let stranger = Contact { token: !contact.token, ..contact.clone() };
        line.hold(Vec::new(), |_, _| {}).expect("threads");
        assert!(!contact.addresses.is_empty());
        for &address in &contact.addresses {
            contact.connect(address).expect("a connection");
            let refused = stranger.connect(address).expect_err("another token");
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        }
    }
}

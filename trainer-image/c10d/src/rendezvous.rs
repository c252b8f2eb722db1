//! How the ranks of one attempt find each other.
//!
//! Rank 0 serves the store; the others look its name up and connect, again and again, until one deadline: in Kubernetes a
//! pod's name appears many seconds late, and may first point at the pod of the attempt before. So every key carries the
//! attempt's number, a client stays only where the server shows the number it looks for, and nobody leaves before all
//! have come. Who waits tells from time to time for what: a name that does not resolve, a port that refuses or does not
//! answer, ranks that are missing.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::{Error, Result, Store};

/// Between two tries to find or reach rank 0.
const RETRY: Duration = Duration::from_millis(200);
/// How long one connection, or one look for the attempt's key, may take.
const TRY: Duration = Duration::from_secs(3);
/// The key under which rank 0 counts once all have come.
const COMPLETE: &str = "complete";
/// Between two words about what is waited for.
const TELL: Duration = Duration::from_secs(10);
/// Missing ranks that are named.
const NAMED: usize = 32;
/// What "no deadline" comes to.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);

/// Where and as whom to meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendezvous {
    /// A name or address of rank 0's machine.
    pub host: String,
    /// The store's port there.
    pub port: u16,
    /// This process's rank.
    pub rank: u32,
    /// The number of ranks.
    pub world_size: u32,
    /// The number of this attempt. A failed attempt's number is never used again.
    pub attempt: u32,
    /// The time after which a rank gives up, from its call of [`Rendezvous::connect`]; later, the bound of every
    /// operation of the store.
    pub deadline: Duration,
}

impl Rendezvous {
    /// Meets the other ranks. Returns the store, its keys under this attempt, when all ranks have come; before that, at the
    /// deadline, [`Error::Timeout`] with what was missing. Rank 0's store is the server: it, or a group made from it, has
    /// to live as long as anyone uses the store.
    pub fn connect(&self) -> Result<Store> {
        self.connect_telling(&|_| ())
    }

    /// As [`Rendezvous::connect`]; `told` hears every ten seconds what is waited for, and since when.
    pub fn connect_telling(&self, told: &dyn Fn(&str)) -> Result<Store> {
        self.connect_with(told, |host, port| Ok((host, port).to_socket_addrs()?.map(|address| address.ip()).collect()))
    }

    fn connect_with(
        &self,
        told: &dyn Fn(&str),
        resolve: impl Fn(&str, u16) -> io::Result<Vec<IpAddr>>,
    ) -> Result<Store> {
        if self.rank >= self.world_size {
            return Err(Error::Torch(format!("rank {} of {} does not exist", self.rank, self.world_size)));
        }
        let started = Instant::now();
        let mut wait = Wait { started, end: started + self.deadline.min(LONGEST), next: started + TELL, told };
        let store = if self.rank == 0 { self.serve(&mut wait)? } else { self.join(&mut wait, resolve)? };
        store.set_timeout(self.deadline)?;
        self.announce(&store)?;
        if self.rank == 0 {
            self.gather(&store, &mut wait)?
        } else {
            self.await_all(&store, &mut wait)?
        }
        Ok(store)
    }

    /// Starts the server. The port may still be taken by the attempt before, which is on its way out.
    fn serve(&self, wait: &mut Wait<'_>) -> Result<Store> {
        let context = |e: Error| e.context(&format!("rank 0 cannot serve the store on port {}", self.port));
        let store = wait.retry(|left| Store::tcp("127.0.0.1", self.port, true, 0, left).map_err(context))?;
        let store = store.prefix(&self.prefix())?;
        store.set("serving", b"")?;
        Ok(store)
    }

    /// Finds the server of this attempt.
    fn join(&self, wait: &mut Wait<'_>, resolve: impl Fn(&str, u16) -> io::Result<Vec<IpAddr>>) -> Result<Store> {
        let Rendezvous { host, port, rank, .. } = self;
        let found = wait.retry(|left| {
            let mut result = Err(Error::Distributed(format!("the name {host} has no address")));
            let addresses = resolve(host, *port);
            for address in
                addresses.map_err(|e| Error::Distributed(format!("the name {host} does not resolve ({e})")))?
            {
                result = self.try_address(address, left);
                if result.is_ok() {
                    break;
                }
            }
            result
        });
        found.map_err(|e| {
            Error::Timeout(format!("rank {rank} did not find rank 0 at {host}:{port} in {:?}: {e}", self.deadline))
        })
    }

    fn try_address(&self, address: IpAddr, left: Duration) -> Result<Store> {
        let (at, most) = (SocketAddr::new(address, self.port), left.clamp(RETRY, TRY));
        // The store's own client does not tell a port that refuses from one that does not answer.
        TcpStream::connect_timeout(&at, most).map_err(|e| Error::Distributed(unreachable(at, most, &e)))?;
        let store = Store::tcp(&address.to_string(), self.port, false, 0, most)?;
        let store = store.prefix(&self.prefix())?;
        let stale = |e: Error| e.context(&format!("the store at {at} does not serve attempt {}", self.attempt));
        store.wait("serving", most).map_err(stale)?;
        Ok(store)
    }

    /// Tells rank 0 that this rank is here.
    fn announce(&self, store: &Store) -> Result<()> {
        let Rendezvous { rank, attempt, .. } = self;
        match store.add(&present(*rank), 1)? {
            1 => Ok(()),
            _ => Err(Error::Distributed(format!(
                "rank {rank} has joined attempt {attempt} before; a restarted rank needs a new attempt of all ranks"
            ))),
        }
    }

    /// Rank 0: waits for all, then lets them go.
    fn gather(&self, store: &Store, wait: &mut Wait<'_>) -> Result<()> {
        let late = |e: Error| match e {
            Error::Timeout(_) => Error::Timeout(format!(
                "of {} ranks of attempt {}, these did not come in {:?}: {}",
                self.world_size,
                self.attempt,
                self.deadline,
                self.missing(store)
            )),
            other => other,
        };
        (1..self.world_size).try_for_each(|rank| self.await_count(store, wait, &present(rank))).map_err(late)?;
        store.add(COMPLETE, 1).map(drop)
    }

    /// Another rank: waits for rank 0's word that all have come.
    fn await_all(&self, store: &Store, wait: &mut Wait<'_>) -> Result<()> {
        let Rendezvous { rank, attempt, world_size, deadline, .. } = self;
        self.await_count(store, wait, COMPLETE).map_err(|e| {
            let missing = match &e {
                Error::Timeout(_) => format!(" (missing: {})", self.missing(store)),
                _ => String::new(),
            };
            e.context(&format!(
                "rank {rank} is here, but not all {world_size} ranks of attempt {attempt} in {deadline:?}{missing}"
            ))
        })
    }

    /// Waits until somebody has counted under a key, and tells who is missing meanwhile. It asks again and again: a client of
    /// libtorch's store whose wait ran out of time takes the answer to that for the answer to its next one.
    fn await_count(&self, store: &Store, wait: &mut Wait<'_>, key: &str) -> Result<()> {
        while store.add(key, 0)? == 0 {
            if wait.left() <= RETRY {
                return Err(Error::Timeout("time is up".into()));
            }
            wait.tell(|| format!("ranks that have not come: {}", self.missing(store)));
            sleep(RETRY);
        }
        Ok(())
    }

    /// The ranks that have not come, as a list; empty where the store does not tell.
    fn missing(&self, store: &Store) -> String {
        let absent = |rank: &u32| store.add(&present(*rank), 0).is_ok_and(|count| count == 0);
        let absent: Vec<u32> = (0..self.world_size).filter(absent).take(NAMED + 1).collect();
        let mut named: Vec<String> = absent.iter().take(NAMED).map(u32::to_string).collect();
        if absent.len() > NAMED {
            named.push("and more".into());
        }
        named.join(", ")
    }

    fn prefix(&self) -> String {
        format!("attempt-{}/", self.attempt)
    }
}

fn present(rank: u32) -> String {
    format!("present-{rank}")
}

/// What a connection that did not come about means.
fn unreachable(at: SocketAddr, tried: Duration, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => format!("{at} refuses connections: rank 0 does not serve there (yet)"),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
            format!(
                "{at} did not answer within {tried:?}: its machine is gone, or a network policy or firewall is between"
            )
        }
        _ => format!("{at} cannot be reached ({error})"),
    }
}

/// A wait until a deadline, and who is told about it.
struct Wait<'a> {
    started: Instant,
    end: Instant,
    next: Instant,
    told: &'a dyn Fn(&str),
}

impl Wait<'_> {
    fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// Tells what is waited for, if it is time.
    fn tell(&mut self, what: impl FnOnce() -> String) {
        let now = Instant::now();
        if now >= self.next {
            self.next = now + TELL;
            (self.told)(&format!("{} (for {} s)", what(), (now - self.started).as_secs()));
        }
    }

    /// Tries until it works or the deadline passes; then the last error. Only what may get better is tried again. `attempt`
    /// hears how much time is left.
    fn retry<T>(&mut self, mut attempt: impl FnMut(Duration) -> Result<T>) -> Result<T> {
        loop {
            match attempt(self.left()) {
                Err(e @ (Error::Distributed(_) | Error::Timeout(_))) if self.left() > RETRY => {
                    self.tell(|| e.to_string());
                    sleep(RETRY);
                }
                result => return result,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread;

    use super::*;

    const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn meeting(port: u16, rank: u32, world_size: u32, attempt: u32) -> Rendezvous {
        crate::init(true);
        let deadline = Duration::from_secs(60);
        Rendezvous { host: "trainer-0.job".into(), port, rank, world_size, attempt, deadline }
    }

    fn free_port() -> u16 {
        TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
    }

    #[test]
    fn a_name_may_resolve_late() {
        let port = free_port();
        thread::scope(|scope| {
            let server = scope.spawn(move || meeting(port, 0, 2, 1).connect().unwrap());
            let lookups = Cell::new(0);
            let store = meeting(port, 1, 2, 1).connect_with(&|_| (), |host, _| {
                assert_eq!(host, "trainer-0.job");
                lookups.set(lookups.get() + 1);
                match lookups.get() {
                    1..=3 => Err(io::Error::other("Name or service not known")),
                    4 => Ok(vec![]),
                    _ => Ok(vec![LOCAL]),
                }
            });
            let (store, server) = (store.unwrap(), server.join().unwrap());
            assert_eq!(lookups.get(), 5);
            server.set("key", b"value").unwrap();
            assert_eq!(store.get("key").unwrap(), b"value");
        });
    }

    /// The name still points at the pod of the attempt before, whose server is alive.
    #[test]
    fn the_store_of_another_attempt_is_left() {
        let port = free_port();
        thread::scope(|scope| {
            let stale = Cell::new(Some(meeting(port, 0, 1, 1).connect().unwrap()));
            let server = scope.spawn(move || meeting(port, 0, 2, 2).connect().unwrap());
            let tries = Cell::new(0);
            let store = meeting(port, 1, 2, 2).connect_with(&|_| (), |_, _| {
                tries.set(tries.get() + 1);
                if tries.get() == 2 {
                    stale.take();
                }
                Ok(vec![LOCAL])
            });
            store.unwrap();
            assert!(tries.get() >= 2);
            server.join().unwrap();
        });
    }

    #[test]
    fn a_rank_comes_once_an_attempt() {
        let port = free_port();
        let resolve = |_: &str, _: u16| Ok(vec![LOCAL]);
        thread::scope(|scope| {
            let server = scope.spawn(move || meeting(port, 0, 2, 1).connect().unwrap());
            meeting(port, 1, 2, 1).connect_with(&|_| (), resolve).unwrap();
            let _server = server.join().unwrap();
            let again = meeting(port, 1, 2, 1).connect_with(&|_| (), resolve).err().unwrap();
            assert!(matches!(&again, Error::Distributed(m) if m.contains("has joined attempt 1 before")), "{again:?}");
        });
    }

    #[test]
    fn a_rank_beyond_the_world_is_refused() {
        assert!(matches!(meeting(1, 2, 2, 1).connect(), Err(Error::Torch(_))));
    }
}

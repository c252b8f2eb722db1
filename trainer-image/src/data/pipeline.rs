//! Records are parsed and encoded on all cores, and taken in the file's order, whichever core was done first.
//!
//! A few batches are on their way at a time, so that memory does not depend on the file's size.

use super::files::DataFile;
use super::records::{self, Place, Record, Wanted};
use crate::error::{Error, Result};
use std::num::NonZero;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

/// A batch ends with the record with which it has so many bytes.
const BATCH_BYTES: usize = 1 << 18;
/// Batches on their way, for each core.
const BATCHES: usize = 2;

/// Records as they stand in a file.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    records: Vec<(Spot, Result<Range<usize>>)>,
}

/// A place without its file.
#[derive(Clone, Copy)]
enum Spot {
    Line(u64),
    Row(u64),
}

impl Spot {
    fn of(place: Place<'_>) -> Self {
        match place {
            Place::Line(_, number) => Self::Line(number),
            Place::Row(_, number) => Self::Row(number),
        }
    }

    fn at(self, path: &Path) -> Place<'_> {
        match self {
            Self::Line(number) => Place::Line(path, number),
            Self::Row(number) => Place::Row(path, number),
        }
    }
}

impl Batch {
    fn add(&mut self, place: Place<'_>, bytes: Result<&[u8]>) {
        let range = bytes.map(|bytes| {
            let start = self.bytes.len();
            self.bytes.extend_from_slice(bytes);
            start..self.bytes.len()
        });
        self.records.push((Spot::of(place), range));
    }
}

/// A batch, and where its results are to go.
type Work<T> = (Batch, SyncSender<Vec<Result<T>>>);

/// What is taken next: a batch's results, the file's hash, or what ended the reading.
enum Next<T> {
    Batch(Receiver<Vec<Result<T>>>),
    End(Result<[u8; 32]>),
}

/// Encodes each record of a file and hands the results to `take` in the file's order. Returns the hash of the file's bytes.
pub(super) fn in_order<T: Send>(
    file: &DataFile,
    wanted: &Wanted,
    encode: &(impl Fn(&Record<'_>) -> Result<T> + Sync),
    mut take: impl FnMut(Result<T>) -> Result<()>,
) -> Result<[u8; 32]> {
    let expected = file.expected(wanted);
    let encode_all = |batch: &Batch| -> Vec<Result<T>> {
        let one = |(spot, range): &(Spot, Result<Range<usize>>)| {
            let bytes = &batch.bytes[range.clone()?];
            encode(&Record::parse(file, spot.at(&file.path), &expected, bytes)?)
        };
        batch.records.iter().map(one).collect()
    };
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let (give, work) = sync_channel::<Work<T>>(cores);
    let (order, next) = sync_channel::<Next<T>>(BATCHES * cores);
    let work = Mutex::new(work);
    std::thread::scope(|scope| {
        // Who waits for the other end of a channel is woken as that is dropped: here all of them end with the first error.
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let taken = work.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((batch, results)) = taken else { return };
                    // Of a batch that panics its taker learns as `results` goes; the thread is there for what waits behind it.
                    if let Ok(encoded) = catch_unwind(AssertUnwindSafe(|| encode_all(&batch))) {
                        let _ = results.send(encoded);
                    }
                }
            });
        }
        scope.spawn(move || {
            let end = hand_out(file, wanted, &give, &order);
            let _ = order.send(Next::End(end));
        });
        for next in next {
            match next {
                Next::Batch(results) => {
                    let results = results.recv().map_err(|_| Error::bug("a thread that encodes records panicked"))?;
                    for result in results {
                        take(result)?;
                        records::count_record();
                    }
                }
                Next::End(end) => return end,
            }
        }
        Err(Error::bug("the thread that reads records panicked"))
    })
}

/// Reads a file in batches.
fn hand_out<T>(
    file: &DataFile,
    wanted: &Wanted,
    give: &SyncSender<Work<T>>,
    order: &SyncSender<Next<T>>,
) -> Result<[u8; 32]> {
    let mut batch = Batch::default();
    // Nobody takes any more where an error has ended it, which is told there.
    let gone = || Error::bug("nobody takes what is read");
    let hand_on = |batch: Batch| {
        let (results, of_batch) = sync_channel(1);
        order.send(Next::Batch(of_batch)).map_err(|_| gone())?;
        give.send((batch, results)).map_err(|_| gone())
    };
    let hash = records::read(file, wanted, &mut |place, bytes| {
        batch.add(place, bytes);
        match batch.bytes.len() >= BATCH_BYTES {
            true => hand_on(std::mem::take(&mut batch)),
            false => Ok(()),
        }
    });
    // What was read before an error comes first.
    hand_on(batch)?;
    hash
}

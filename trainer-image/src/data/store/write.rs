//! A dataset on its way into files: records as they come, then the split. What is kept in memory does not grow with the tokens.

use super::header::{Header, MadeFrom};
use super::part::{Name, Part, Sink};
use super::{Store, Stored};
use crate::data::packing;
use crate::data::records;
use crate::data::split::{self, Keys};
use crate::data::summary::{About, Dropped, Summary};
use crate::error::{Error, Result};
use crate::hex::hex;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::Path;

/// The hashes of all records, while the dataset is made.
const KEYS: &str = "keys";
/// Rows between two signs of life.
const ROWS: usize = 1 << 12;

/// A file of records while it is read.
struct Source {
    name: String,
    /// How often its records are trained on; `None` where they are for evaluation.
    weight: Option<f64>,
    /// Which records are its.
    records: Range<usize>,
    /// Records that cannot be used.
    bad: u64,
    first_bad: Option<String>,
    read: u64,
}

/// How a dataset is split, and told.
pub(in crate::data) struct Plan<'a> {
    /// Seeds the split.
    pub seed: u64,
    /// The share of records that is held out.
    pub eval_fraction: f64,
    /// Completes "no record can be used, n dropped: ".
    pub why_dropped: &'a str,
    /// The most tokens of a row into which several records are packed, where they are.
    pub packing: Option<usize>,
}

/// Writes the parts of a dataset.
pub(in crate::data) struct Writer {
    parts: BTreeMap<Name, Sink>,
    keys: Sink,
    sources: Vec<Source>,
    summary: Summary,
    tokens: u64,
    sequences: u64,
    text: u64,
    records: usize,
}

impl Writer {
    /// Into a folder, or into memory.
    pub fn new(dir: Option<&Path>) -> Result<Self> {
        let sink = |name: Name| Ok((name, Sink::new(dir, name.file())?));
        Ok(Self {
            parts: Name::ALL.into_iter().map(sink).collect::<Result<_>>()?,
            keys: Sink::new(dir, KEYS)?,
            sources: Vec::new(),
            summary: Summary::default(),
            tokens: 0,
            sequences: 0,
            text: 0,
            records: 0,
        })
    }

    /// A file begins: one to train on with its weight, or that for evaluation.
    pub fn begin(&mut self, name: String, weight: Option<f64>) {
        let records = self.records..self.records;
        self.sources.push(Source { name, weight, records, bad: 0, first_bad: None, read: 0 });
    }

    /// Counts a record that cannot be used, and says why.
    pub fn skip(&mut self, why: String) {
        self.read();
        self.summary.dropped += 1;
        self.summary.bad += 1;
        self.summary.first_bad.get_or_insert_with(|| why.clone());
        if let Some(source) = self.sources.last_mut() {
            source.bad += 1;
            source.first_bad.get_or_insert(why);
        }
    }

    /// Counts a record that is left out.
    pub fn drop_record(&mut self, why: Dropped) {
        self.read();
        self.summary.dropped += 1;
        match why {
            Dropped::WithoutTarget => self.summary.without_target += 1,
            Dropped::Unusable => self.summary.unusable += 1,
        }
    }

    fn read(&mut self) {
        self.summary.records += 1;
        self.sources.iter_mut().next_back().into_iter().for_each(|source| source.read += 1);
    }

    /// Adds what one record became.
    pub fn keep<T: Stored>(&mut self, items: &[T], keys: Keys, about: About) -> Result<()> {
        self.read();
        self.summary.truncated += u64::from(about.truncated);
        self.summary.empty += u64::from(about.empty);
        for item in items {
            self.add(item)?;
            self.keys.write(&keys.bytes())?;
            self.records += 1;
            self.sources.iter_mut().next_back().into_iter().for_each(|source| source.records.end += 1);
        }
        Ok(())
    }

    fn write(&mut self, name: Name, bytes: &[u8]) -> Result<()> {
        self.parts.get_mut(&name).map_or(Ok(()), |sink| sink.write(bytes))
    }

    fn add<T: Stored>(&mut self, item: &T) -> Result<()> {
        let mut count = 0;
        for sequence in item.sequences() {
            count += 1;
            for id in sequence {
                let id = u32::try_from(*id).map_err(|_| Error::bug(format!("{id} is no token's id")))?;
                self.write(Name::Tokens, &id.to_le_bytes())?;
            }
            self.tokens += sequence.len() as u64;
            self.write(Name::Sequences, &self.tokens.to_le_bytes())?;
            let summary = &mut self.summary;
            summary.tokens += sequence.len() as u64;
            summary.longest_tokens = summary.longest_tokens.max(sequence.len() as u64);
            summary.highest_id = sequence.iter().fold(summary.highest_id, |most, id| most.max(*id));
        }
        self.sequences += count;
        self.summary.sequences = self.summary.sequences.max(count);
        let targets: Vec<u8> = item.targets().iter().map(|target| u8::from(*target)).collect();
        self.write(Name::Targets, &targets)?;
        self.write(Name::Records, &self.sequences.to_le_bytes())?;
        if let Some(text) = item.text() {
            self.text += text.len() as u64;
            self.write(Name::Texts, text.as_bytes())?;
            self.write(Name::TextEnds, &self.text.to_le_bytes())?;
        }
        Ok(())
    }

    /// A file has been read.
    ///
    /// # Errors
    /// None of its records can be used.
    pub fn end(&self) -> Result<()> {
        match self.sources.last() {
            Some(Source { name, bad, first_bad: Some(first), read, .. }) if bad == read => {
                Err(Error::input(format!("{name}: no record can be used, {bad} dropped, the first: {first}")))
            }
            _ => Ok(()),
        }
    }

    /// Splits what was added.
    ///
    /// # Errors
    /// If no record was kept to train on, or none of the file for evaluation; or where storage failed.
    pub fn finish(mut self, plan: &Plan<'_>) -> Result<Written> {
        let keys = std::mem::replace(&mut self.keys, Sink::Memory(vec![])).done()?;
        let (train, eval) = self.split(plan, &keys)?;
        self.summary.eval_in_training = self.overlap(&keys);
        let mut written = Written { parts: BTreeMap::new(), summary: self.summary, rows: [0; 32] };
        let mut late = BTreeMap::new();
        for (name, sink) in self.parts {
            match name {
                Name::Train | Name::Eval | Name::TrainRows | Name::EvalRows => drop(late.insert(name, sink)),
                _ => drop(written.parts.insert(name, sink.done()?)),
            }
        }
        written.order(plan, late, train, eval)?;
        Ok(written)
    }

    /// The numbers of the records that an epoch has, and of those held out.
    fn split(&mut self, plan: &Plan<'_>, keys: &Part) -> Result<(Vec<u32>, Vec<u32>)> {
        let of = |record: usize| -> Keys {
            keys.get(record * Keys::BYTES..(record + 1) * Keys::BYTES).map_or(Keys::of(&[0; Keys::BYTES]), Keys::of)
        };
        let all = self.sources.iter().filter(|s| s.weight.is_some()).flat_map(|s| s.records.clone());
        let below = split::threshold(all.map(|record| of(record).split), plan.eval_fraction);
        if u32::try_from(self.records).is_err() {
            return Err(Error::input(format!(
                "the dataset has {} records, more than 2^32: leave some out",
                self.records
            )));
        }
        let (mut train, mut eval) = (Vec::new(), Vec::new());
        for source in &self.sources {
            let Some(weight) = source.weight else {
                eval.extend(source.records.clone().map(|record| record as u32));
                continue;
            };
            let before = train.len();
            // A small share of few records may draw none: then it is the one that was closest to be drawn.
            let mut closest = None;
            for record in source.records.clone() {
                let keys = of(record);
                if keys.split < below {
                    eval.push(record as u32);
                    continue;
                }
                train.extend(std::iter::repeat_n(record as u32, split::times(weight, plan.seed, keys.own)));
                let draw = split::draw(plan.seed, keys.own);
                if closest.is_none_or(|(least, _)| draw < least) {
                    closest = Some((draw, record as u32));
                }
            }
            if train.len() == before {
                match closest {
                    Some((_, record)) => train.push(record),
                    None if source.read > 0 => self.summary.sources_left_out.push(source.name.clone()),
                    None => {}
                }
            }
        }
        let own_eval = self.sources.iter().any(|source| source.weight.is_none());
        if train.is_empty() {
            return Err(nothing_left(&self.summary, "", plan.why_dropped));
        }
        if own_eval && eval.is_empty() {
            return Err(nothing_left(&self.summary, " for evaluation", plan.why_dropped));
        }
        if self.sources.len() == 1 {
            self.summary.sources_left_out.clear();
        }
        (self.summary.train, self.summary.eval) = (train.len() as u64, eval.len() as u64);
        Ok((train, eval))
    }

    /// How many records of the file for evaluation ask what is trained on.
    fn overlap(&self, keys: &Part) -> u64 {
        let prompt = |record: usize| {
            keys.get(record * Keys::BYTES..(record + 1) * Keys::BYTES).map(|bytes| Keys::of(bytes).prompt)
        };
        let of = |eval: bool| {
            let sources = self.sources.iter().filter(move |source| source.weight.is_none() == eval);
            sources.flat_map(|source| source.records.clone()).filter_map(prompt)
        };
        let asked: HashSet<u64> = of(true).collect();
        if asked.is_empty() {
            return 0;
        }
        let trained: HashSet<u64> = of(false).filter(|prompt| asked.contains(prompt)).collect();
        of(true).filter(|prompt| trained.contains(prompt)).count() as u64
    }
}

/// There is no record, or none of this use.
fn nothing_left(summary: &Summary, which: &str, why_dropped: &str) -> Error {
    let Summary { records, dropped, first_bad, .. } = summary;
    Error::input(match first_bad {
        _ if *records == 0 => "the file has no record".into(),
        _ if *dropped == 0 => format!("no record{which} is left"),
        Some(first) => format!("no record{which} can be used, {dropped} dropped, the first: {first}"),
        None => format!("no record{which} can be used, {dropped} dropped: {why_dropped}"),
    })
}

/// A dataset that is written but for its header.
pub(in crate::data) struct Written {
    parts: BTreeMap<Name, Part>,
    pub summary: Summary,
    /// Hash of all rows of tokens.
    rows: [u8; 32],
}

impl Written {
    /// Writes which records an epoch has and which are held out, in rows where they are packed.
    fn order(
        &mut self,
        plan: &Plan<'_>,
        mut sinks: BTreeMap<Name, Sink>,
        train: Vec<u32>,
        eval: Vec<u32>,
    ) -> Result<()> {
        let mut hasher = Sha256::new();
        for (half, names) in [(train, [Name::Train, Name::TrainRows]), (eval, [Name::Eval, Name::EvalRows])] {
            let (half, ends) = match plan.packing {
                None => (half, vec![]),
                Some(room) => {
                    let lengths = half.iter().map(|record| self.tokens(*record as usize)).collect::<Option<Vec<_>>>();
                    let lengths = lengths.ok_or_else(|| Error::bug("a dataset's parts do not fit together"))?;
                    packing::rows(&half, &lengths, room)
                }
            };
            for (i, record) in half.iter().enumerate() {
                self.hash_record(&mut hasher, *record as usize)?;
                if i % ROWS == 0 {
                    records::alive();
                }
                put(&mut sinks, names[0], &record.to_le_bytes())?;
            }
            let mut start = 0;
            for end in &ends {
                let tokens = half.get(start..*end as usize).unwrap_or_default();
                let tokens: usize = tokens.iter().filter_map(|record| self.tokens(*record as usize)).sum();
                self.summary.longest_tokens = self.summary.longest_tokens.max(tokens as u64);
                start = *end as usize;
                put(&mut sinks, names[1], &end.to_le_bytes())?;
            }
            if plan.packing.is_some() && names[0] == Name::Train {
                self.summary.packed_rows = Some(ends.len() as u64);
            }
        }
        self.rows = hasher.finalize().into();
        for (name, sink) in sinks {
            self.parts.insert(name, sink.done()?);
        }
        Ok(())
    }

    /// Tokens of a record's sequences.
    fn tokens(&self, record: usize) -> Option<usize> {
        let sequences = self.parts.get(&Name::Records)?.piece(record)?;
        let ends = self.parts.get(&Name::Sequences)?;
        sequences.map(|sequence| ends.piece(sequence).map(|tokens| tokens.len())).sum()
    }

    /// As checkpoints hash what their run learns from: the length of each row and its tokens, of eight bytes each.
    fn hash_record(&self, hasher: &mut Sha256, record: usize) -> Result<()> {
        let mut hash = || {
            for sequence in self.parts.get(&Name::Records)?.piece(record)? {
                let row = self.parts.get(&Name::Sequences)?.piece(sequence)?;
                let ids = self.parts.get(&Name::Tokens)?.ids(row)?;
                let mut bytes = Vec::with_capacity(8 * ids.len() + 8);
                bytes.extend((ids.len() as u64).to_le_bytes());
                ids.iter().for_each(|id| bytes.extend(id.to_le_bytes()));
                hasher.update(&bytes);
            }
            Some(())
        };
        hash().ok_or_else(|| Error::bug("a dataset's parts do not fit together"))
    }

    fn header(&self, made_from: MadeFrom) -> Header {
        let parts = self.parts.iter().map(|(name, part)| (name.file().to_owned(), part.len() as u64)).collect();
        Header::new(made_from, self.summary.clone(), hex(&self.rows), parts)
    }

    /// Writes the header into the folder of the parts, and removes what only the making needed.
    pub fn seal(self, dir: &Path, made_from: MadeFrom) -> Result<()> {
        self.header(made_from).write(dir)?;
        crate::files::remove_file(&dir.join(KEYS))
    }

    /// As a dataset in memory.
    pub fn held(self, made_from: MadeFrom) -> Store {
        let header = self.header(made_from);
        Store::new(Path::new("(in memory)").into(), header, [0; 32], self.parts)
    }
}

fn put(sinks: &mut BTreeMap<Name, Sink>, name: Name, bytes: &[u8]) -> Result<()> {
    sinks.get_mut(&name).map_or(Ok(()), |sink| sink.write(bytes))
}

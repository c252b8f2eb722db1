//! A link of a model's chain: the chunk of one segment, and that of its adapters where it has some.
//!
//! A chunk that is trained belongs to one model. A frozen one may be shared by several, each with its own adapters; it has
//! no gradient and no optimizer state. Of a link at most one chunk is trained.

use super::chunk::{Chunk, Fetch, Held};
use crate::error::Result;
use crate::model::Dropout;
use crate::model::transformer::{Adapter, BlockParams, Params};
use std::rc::Rc;
use tch::Tensor;

/// A segment's chunk.
enum Base {
    Own(Box<Chunk>),
    Shared(Rc<Chunk>),
}

/// A segment's chunk and its adapters'.
pub(super) struct Link {
    base: Base,
    adapter: Option<Chunk>,
}

impl Link {
    /// A segment of which the model alone has the chunk.
    pub(super) fn own(chunk: Chunk) -> Self {
        Self { base: Base::Own(Box::new(chunk)), adapter: None }
    }

    /// A segment on a frozen chunk.
    pub(super) fn shared(chunk: &Rc<Chunk>, adapter: Option<Chunk>) -> Self {
        Self { base: Base::Shared(chunk.clone()), adapter }
    }

    /// The same frozen chunk without adapters; `None` where the model alone has the chunk.
    pub(super) fn without_adapter(&self) -> Option<Self> {
        match &self.base {
            Base::Own(_) => None,
            Base::Shared(chunk) => Some(Self::shared(chunk, None)),
        }
    }

    /// The segment's chunk, shared or not.
    pub(super) fn base(&self) -> &Chunk {
        match &self.base {
            Base::Own(chunk) => chunk,
            Base::Shared(chunk) => chunk,
        }
    }

    /// The chunk of the adapters.
    pub(super) fn adapter(&self) -> Option<&Chunk> {
        self.adapter.as_ref()
    }

    /// The segment's chunk, where the model alone has it.
    pub(super) fn own_chunk(&self) -> Option<&Chunk> {
        match &self.base {
            Base::Own(chunk) => Some(chunk),
            Base::Shared(_) => None,
        }
    }

    /// The chunk that is trained.
    pub(super) fn trained(&self) -> Option<&Chunk> {
        self.adapter.as_ref().or(self.own_chunk()).filter(|chunk| chunk.is_trained())
    }

    /// The chunk that is trained.
    pub(super) fn trained_mut(&mut self) -> Option<&mut Chunk> {
        let own = match &mut self.base {
            Base::Own(chunk) => Some(&mut **chunk),
            Base::Shared(_) => None,
        };
        self.adapter.as_mut().or(own).filter(|chunk| chunk.is_trained())
    }

    /// Starts bringing everything to the device.
    pub(super) fn fetch(&self) -> Result<LinkFetch> {
        let adapter = self.adapter.as_ref().map(Chunk::fetch).transpose()?;
        Ok(LinkFetch { base: self.base().fetch()?, adapter })
    }

    /// Starts bringing everything back into memory that was parked.
    pub(super) fn fetch_again(&self, held: HeldLink) -> Result<LinkFetch> {
        let adapter =
            self.adapter.as_ref().zip(held.adapter).map(|(chunk, held)| chunk.fetch_again(held)).transpose()?;
        Ok(LinkFetch { base: self.base().fetch_again(held.base)?, adapter })
    }
}

/// A segment's parameters on the device, for as long as this lives.
pub(super) struct HeldLink {
    base: Held,
    adapter: Option<Held>,
}

impl HeldLink {
    /// The segment's own parameters.
    pub(super) fn params(&self) -> &Params {
        self.base.params()
    }

    /// All parameters of the block with this index, whose adapters' output is multiplied by `scale`.
    pub(super) fn block<'p>(&'p self, block: usize, scale: f64, dropout: Option<&'p Dropout>) -> BlockParams<'p> {
        let adapter = self.adapter.as_ref().map(|held| Adapter { params: held.params(), scale, dropout, block });
        BlockParams { base: self.base.params(), adapter, index: block }
    }

    /// The tensors of the chunk that is trained, in order.
    pub(super) fn trained(&self) -> impl Iterator<Item = &Tensor> {
        self.base.params().trained().chain(self.adapter.iter().flat_map(|held| held.params().trained()))
    }

    /// Gives the memory back while a graph still refers to it.
    pub(super) fn park(&self) -> Result<()> {
        self.base.park()?;
        self.adapter.as_ref().map_or(Ok(()), Held::park)
    }
}

/// A segment's parameters on their way to the device.
#[must_use = "the parameters are there only after ready()"]
pub(super) struct LinkFetch {
    base: Fetch,
    adapter: Option<Fetch>,
}

impl LinkFetch {
    /// Waits until the parameters are there.
    pub(super) fn ready(self) -> Result<HeldLink> {
        let adapter = self.adapter.map(Fetch::ready).transpose()?;
        Ok(HeldLink { base: self.base.ready()?, adapter })
    }
}

impl From<HeldLink> for LinkFetch {
    fn from(held: HeldLink) -> Self {
        Self { base: held.base.into(), adapter: held.adapter.map(Fetch::from) }
    }
}

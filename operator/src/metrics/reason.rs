//! What can be wrong with a pass: the values of the error counter's label.

/// Why a pass failed, or did less than it set out to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A read failed.
    Observe,
    /// A write failed.
    Apply,
    /// What the pass decided on had changed meanwhile.
    Stale,
    /// The API server did not answer in time.
    TimedOut,
    /// The API server refused a child.
    Blocked,
    /// The object cannot be read as an RLHFJob.
    Undecodable,
    /// It took too long to decide what follows, or met a bug.
    Undecided,
}

impl Reason {
    pub(super) const ALL: [Self; 7] =
        [Self::Observe, Self::Apply, Self::Stale, Self::TimedOut, Self::Blocked, Self::Undecodable, Self::Undecided];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Observe => "Observe",
            Self::Apply => "Apply",
            Self::Stale => "Stale",
            Self::TimedOut => "TimedOut",
            Self::Blocked => "Blocked",
            Self::Undecodable => "Undecodable",
            Self::Undecided => "Undecided",
        }
    }
}

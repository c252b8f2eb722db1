//! What keeps pods from being made or started.

use super::join;

/// What keeps an attempt's pods from being made or started.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wait {
    /// One CamelCase word.
    pub reason: String,
    /// What it is about.
    pub text: String,
}

impl Wait {
    /// The reason of a pod for which no node is found.
    pub const UNSCHEDULABLE: &str = "Unschedulable";
    /// The reason of a pod that its scheduler does not look at yet, as the one says who holds it back.
    pub const GATED: &str = "SchedulingGated";
    /// The reason of a pod whose image cannot be pulled.
    pub const IMAGE_PULL: &str = "ImagePull";
    /// The reason of a pod whose image has no valid name, so that no kubelet will ever find it.
    pub const INVALID_IMAGE: &str = "InvalidImageName";
    /// The reason of pods or other children that a quota refuses.
    pub const QUOTA: &str = "QuotaExceeded";
    /// The reason of pods or other children that are refused otherwise.
    pub const REFUSED: &str = "Refused";
    /// The reason of pods that are made once a queue lets their Job run.
    pub const QUEUED: &str = "Queued";
    /// The reason of pods whose Job somebody has suspended without a queue.
    pub const HELD: &str = "JobSuspended";
    /// The reason of stages that are to be planned, and no node tells the memory of its devices.
    pub const MEMORY_UNKNOWN: &str = "DeviceMemoryUnknown";
    /// The reason of stages that fit on devices with more memory than nodes tell of.
    pub const MEMORY_TOO_SMALL: &str = "DeviceMemoryTooSmall";

    /// Of these words.
    pub fn new(reason: impl Into<String>, text: impl Into<String>) -> Self {
        Self { reason: reason.into(), text: text.into() }
    }

    /// From the API server's words about an object that it did not take.
    pub fn refusal(message: &str) -> Self {
        // Both of the quota's own sentences: it is used up, or it wants requests or limits that are not there.
        let quota = message.contains("exceeded quota: ") || message.contains("failed quota: ");
        // What comes before names a pod, and another one each time.
        let text = message.split_once(" is forbidden: ").map_or(message, |(_, why)| why);
        Self::new(if quota { Self::QUOTA } else { Self::REFUSED }, text)
    }

    /// Whether nobody but the job's author can end the waiting, by another job.
    pub fn is_permanent(&self) -> bool {
        self.reason == Self::INVALID_IMAGE
    }

    /// Whether it is for room or for somebody's permission, which is no fault of what waits.
    pub fn is_for_others(&self) -> bool {
        let room = [Self::UNSCHEDULABLE, Self::GATED, Self::MEMORY_UNKNOWN, Self::MEMORY_TOO_SMALL];
        let permission = [Self::QUOTA, Self::REFUSED, Self::QUEUED, Self::HELD];
        room.contains(&self.reason.as_str()) || permission.contains(&self.reason.as_str())
    }
}

impl std::fmt::Display for Wait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", join(Some(&self.reason), Some(&self.text)))
    }
}

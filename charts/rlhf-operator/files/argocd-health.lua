-- The health of an RLHFJob for Argo CD: argocd-cm, resource.customizations.health.rlhf.dev_RLHFJob.
local health = {status = "Progressing", message = "The operator has not looked at it yet"}
local status = obj.status
if status == nil then
  return health
end
local held = {}
for _, condition in ipairs(status.conditions or {}) do
  if condition.status == "True" then
    held[condition.type] = condition.message or ""
  end
end
health.message = status.message or ""
-- Of a spec that was changed since, it is not known yet what comes of it; what is over stays over.
local over = held.Complete ~= nil or held.Failed ~= nil
if not over and status.observedGeneration ~= nil and obj.metadata.generation ~= nil
    and status.observedGeneration < obj.metadata.generation then
  return health
end
if held.Complete ~= nil then
  health.status = "Healthy"
elseif held.Failed ~= nil then
  health.status = "Degraded"
elseif held.Unsupported ~= nil then
  health.status = "Degraded"
  health.message = held.Unsupported
elseif held.Suspended ~= nil then
  health.status = "Suspended"
end
return health

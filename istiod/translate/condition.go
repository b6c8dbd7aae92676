package translate

// Condition is one of an object's status.conditions, as the mesh has it.
type Condition struct {
	Type    string
	Status  bool
	Reason  string
	Message string
}

// Conditions are those of one object.
type Conditions struct {
	Kind      string // of the object, as in YAML: "Service"
	Namespace string
	Name      string
	List      []Condition // by type, in order
}

// Key names what the conditions are about: Kind namespace/name.
func (c *Conditions) Key() string { return c.Kind + " " + c.Namespace + "/" + c.Name }

// The types of condition, as Istio has them.
const (
	ConditionWaypointBound    = "istio.io/WaypointBound"   // of a Service or ServiceEntry: it asked for a waypoint
	ConditionWaypointMissing  = "istio.io/WaypointMissing" // of a ServiceEntry: it needs a waypoint to have any effect
	ConditionWaypointAccepted = "WaypointAccepted"         // of a policy with targets
)

// The reasons of conditions; all but the last are Istio's.
const (
	ReasonWaypointAccepted   = "WaypointAccepted"
	ReasonWaypointNotReady   = "WaypointIsNotReady"
	ReasonAttachmentDenied   = "AttachmentDenied"
	ReasonUnsupportedTraffic = "UnsupportedTrafficType"
	ReasonCanaryWeight       = "CanaryInvalidWeight"
	ReasonCanarySame         = "CanarySameAsPrimary"

	ReasonAccepted         = "Accepted"
	ReasonInvalid          = "Invalid"
	ReasonPartiallyInvalid = "PartiallyInvalid"
	ReasonAncestorNotBound = "AncestorNotBound"
	ReasonTargetNotFound   = "TargetNotFound"

	ReasonNoWaypoint = "NoWaypoint"
)

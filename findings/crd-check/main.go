// crd-check says what a Kubernetes API server of the pinned version says about a CRD's schema and about objects of it, without a server.
// It reads YAML documents from stdin: the schema of `spec` first, unless -crd names a whole CRD's file, then objects, one a document.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"os"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	v1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdvalidation "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/util/json"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"
)

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func wrap(spec []byte) (crd v1.CustomResourceDefinition) {
	var props v1.JSONSchemaProps
	must(0, yaml.UnmarshalStrict(spec, &props))
	root := v1.JSONSchemaProps{Type: "object", Properties: map[string]v1.JSONSchemaProps{"spec": props}}
	crd.Name = "jobs.example.com"
	crd.Spec = v1.CustomResourceDefinitionSpec{
		Group: "example.com", Scope: v1.NamespaceScoped,
		Names: v1.CustomResourceDefinitionNames{Plural: "jobs", Singular: "job", Kind: "Job", ListKind: "JobList"},
		Versions: []v1.CustomResourceDefinitionVersion{{
			Name: "v1", Served: true, Storage: true, Schema: &v1.CustomResourceValidation{OpenAPIV3Schema: &root},
		}},
	}
	return crd
}

func verdict(errs field.ErrorList) string {
	if len(errs) == 0 {
		return "accepted"
	}
	return "refused: " + errs[0].Error()
}

func main() {
	file := flag.String("crd", "", "a whole CRD")
	version := flag.String("version", "v1", "the version of it to check objects against")
	flag.Parse()
	documents := bytes.Split(must(io.ReadAll(os.Stdin)), []byte("---\n"))

	var crd v1.CustomResourceDefinition
	if *file != "" {
		must(0, yaml.Unmarshal(must(os.ReadFile(*file)), &crd))
	} else {
		crd, documents = wrap(documents[0]), documents[1:]
	}
	v1.SetDefaults_CustomResourceDefinition(&crd)
	v1.SetDefaults_CustomResourceDefinitionSpec(&crd.Spec)
	for _, v := range crd.Spec.Versions {
		if v.Storage {
			crd.Status.StoredVersions = []string{v.Name}
		}
	}
	var in apiextensions.CustomResourceDefinition
	must(0, v1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(&crd, &in, nil))
	errs := crdvalidation.ValidateCustomResourceDefinition(context.TODO(), &in)
	fmt.Println("schema", verdict(errs))
	if len(errs) > 0 {
		return
	}

	versioned := must(apiextensions.GetSchemaForVersion(&in, *version))
	structural := must(schema.NewStructural(versioned.OpenAPIV3Schema))
	openapi, _, err := validation.NewSchemaValidator(versioned.OpenAPIV3Schema)
	must(0, err)
	rules := cel.NewValidator(structural, true, celconfig.PerCallLimit)
	for _, document := range documents {
		var object map[string]any
		must(0, json.Unmarshal(must(yaml.YAMLToJSON(document)), &object))
		errs := validation.ValidateCustomResource(nil, object, openapi)
		if len(errs) == 0 && rules != nil {
			errs, _ = rules.Validate(context.TODO(), nil, structural, object, nil, celconfig.RuntimeCELCostBudget)
		}
		fmt.Printf("%s %s\n", bytes.TrimSpace(document), verdict(errs))
	}
}
